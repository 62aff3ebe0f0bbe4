"""``python -m support.odd_host HOW``: a process of trackers that does what it should not."""

import json
import signal
import subprocess
import sys


def say(**answer):
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def main(how):
    if how == "dies":
        sys.stderr.write("the library\nblew up\n")
        sys.exit(3)
    if how == "chatters":
        sys.stdout.write("no JSON\n")
        for _ in range(3):
            say(say="the same line")
    if how == "hangs":
        child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"], start_new_session=True)
        say(say=f"child {child.pid}")
        signal.pause()
    for line in sys.stdin:
        if json.loads(line)["do"] == "finish":
            say(finished=True)
            return


if __name__ == "__main__":
    main(sys.argv[1])
