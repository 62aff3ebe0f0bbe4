"""Trains while engines generate: ``python train_async.py`` takes the flags of ``train.py``."""

import sys

from miles_launcher.train import main

if __name__ == "__main__":
    sys.exit(main(["--train-async", *sys.argv[1:]]))
