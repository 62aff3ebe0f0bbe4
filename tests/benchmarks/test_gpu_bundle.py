"""The bundle for GPU machines without network: which wheels, what of them, and its parts there and back."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from gpu_bench.bundle_contents import ENVIRONMENT, FLASHINFER, Wheel, names_in, stand_ins, wheels, why_left_out
from gpu_bench.bundle_parts import BundleBroken, exports, install, pack
from gpu_bench.bundle_site import download, place, table_of, unpack, write_stand_ins

BUNDLE = Path(__file__).parents[2] / "benchmarks" / "gpu" / "bundle.py"


def test_what_the_machine_has_stays_at_home_but_for_engine_and_trainer():
    everything = {wheel.name for wheel in wheels()}
    there = names_in("# its list\nPyZMQ==20.0\ntyping_extensions\ntransformers==5.17.0\n\nPydantic-Core @ file:///x\n")
    assert everything - {wheel.name for wheel in wheels(there)} >= {"pyzmq", "pydantic-core"}
    assert {"transformers", "sglang", "sglang-kernel", "megatron-core"} <= {wheel.name for wheel in wheels(there)}
    assert len(everything) == len(wheels())


@pytest.mark.parametrize(
    ("file", "is_it"),
    [
        ("torch_memory_saver-0.0.10-cp39-abi3-manylinux2014_x86_64.whl", True),
        ("Torch.Memory-saver-0.0.10-py3-none-any.whl", False),  # a dash ends the name in a wheel's file name
        ("torch_memory_saver-0.0.1-cp39-abi3-manylinux2014_x86_64.whl", False),
        ("torch_memory_saver-0.0.10.tar.gz", False),
    ],
)
def test_a_pinned_wheel_is_known_by_its_file_name(file, is_it):
    assert Wheel.of("torch_memory_saver==0.0.10").is_file(file) is is_it


def test_what_is_left_out():
    assert why_left_out("sgl_kernel/flash_ops.abi3.so", "sm90")
    assert not why_left_out("sgl_kernel/flash_attn.py", "sm90")
    assert not why_left_out("sgl_kernel/sm90/common_ops.abi3.so", "sm90")
    assert why_left_out("sgl_kernel/sm100/common_ops.abi3.so", "sm90")
    assert why_left_out("sgl_kernel/sm90/common_ops.abi3.so", "sm100")
    assert why_left_out("sglang/multimodal_gen/runtime/server.py", "sm90")
    assert not why_left_out("sglang/srt/multimodal/processor.py", "sm90")
    # tvm_ffi finds xgrammar's library by what RECORD lists.
    assert not why_left_out("xgrammar-0.2.1.dist-info/RECORD", "sm90")


def test_where_a_wheels_files_go():
    assert place("sgl_kernel/sm90/common_ops.abi3.so") == "sgl_kernel/sm90/common_ops.abi3.so"
    assert place("made-1.data/purelib/made/part.py") == "made/part.py"
    assert place("made-1.data/scripts/made") is None
    assert place("/etc/passwd") is None and place("made/../../out") is None


def test_a_wheel_is_unpacked_without_what_is_not_needed(tmp_path):
    cache, site = tmp_path / "cache", tmp_path / "site"
    cache.mkdir()
    with zipfile.ZipFile(cache / "sglang_kernel-0.4.5-cp310-abi3-manylinux2014_x86_64.whl", "w") as wheel:
        wheel.writestr("sgl_kernel/__init__.py", "x = 1\n")
        wheel.writestr("sgl_kernel/flash_ops.abi3.so", b"f" * 2_000_000)
        wheel.writestr("sgl_kernel/sm90/common_ops.abi3.so", b"c" * 1_000_000)
    [(wheel, file)] = download([Wheel.of("sglang-kernel==0.4.5")], cache).items()
    row = unpack(wheel, file, site, "sm90")
    assert sorted(path.name for path in site.rglob("*") if path.is_file()) == ["__init__.py", "common_ops.abi3.so"]
    assert (row.whole, row.kept) == (3_000_006, 1_000_006)
    assert table_of([row]).splitlines()[-1].split()[-1] == "1.0"


def test_stand_ins_can_be_imported_and_say_that_they_are_none(tmp_path):
    write_stand_ins(tmp_path)
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.py")} == set(FLASHINFER)
    scope = {}
    exec(stand_ins()["flashinfer/sampling.py"], scope)
    with pytest.raises(RuntimeError, match="--sglang-sampling-backend pytorch"):
        scope["top_k_top_p_sampling_from_probs"](1, 0.9)


@pytest.fixture
def site(tmp_path):
    made = tmp_path / "site"
    for name, content in {"a/one.py": b"x = 1\n", "a/b/lib.so": os.urandom(5000), "two.py": b"y = 2\n"}.items():
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_bytes(content)
    return made


def contents(directory):
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*.py")} | {
        str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*.so")
    }


def test_parts_come_back_as_they_were_and_replace_what_was_there(tmp_path, site):
    parts = pack(site, tmp_path / "out", 2000)
    assert [part.name for part in parts] == ["part1.bin", "part2.bin", "part3.bin"]
    assert max(part.stat().st_size for part in parts) <= 2000
    target = tmp_path / "target"
    target.mkdir()
    (target / "old.py").write_text("")
    assert install(tmp_path / "out", target)
    assert contents(target) == contents(site)
    assert list((target / "a" / "__pycache__").glob("one.*.pyc"))
    assert not install(tmp_path / "out", target)


def test_the_same_files_make_the_same_parts_and_no_earlier_part_stays(tmp_path, site):
    first = [part.read_bytes() for part in pack(site, tmp_path / "out", 1000)]
    os.utime(site / "two.py", (0, 0))
    assert [part.read_bytes() for part in pack(site, tmp_path / "again", 1000)] == first
    pack(site, tmp_path / "out", 100_000)
    assert sorted(os.listdir(tmp_path / "out")) == ["manifest.json", "part1.bin"]


def test_parts_that_lack_or_differ_are_named_and_nothing_is_replaced(tmp_path, site):
    out, target = tmp_path / "out", tmp_path / "target"
    parts = pack(site, out, 2000)
    install(out, target)
    (target / ".bundle").write_text("another")
    whole = parts[1].read_bytes()
    parts[1].write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(BundleBroken, match=r"part2\.bin"):
        install(out, target)
    parts[1].unlink()
    with pytest.raises(BundleBroken, match=r"lacks part2\.bin.*3 parts"):
        install(out, target)
    (out / "manifest.json").unlink()
    with pytest.raises(BundleBroken, match=r"manifest\.json"):
        install(out, target)
    assert contents(target) == contents(site)


def test_a_shell_takes_the_exports():
    lines = exports(Path("/opt/it's here"), Path("/repo"), ENVIRONMENT)
    script = f'PYTHONPATH=/before\n{lines}\nprintf "%s %s" "$PYTHONPATH" "$SGLANG_IS_FLASHINFER_AVAILABLE"'
    said = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout
    assert said == "/opt/it's here:/repo:/repo/agents:/repo/controller:/repo/launcher:/before false"


def test_the_script_prints_exports_alone_and_ends_with_an_error_where_parts_lack(tmp_path, site):
    pack(site, tmp_path / "out", 100_000)
    command = [sys.executable, str(BUNDLE), "--install", str(tmp_path / "out"), str(tmp_path / "target")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert {line.split()[0] for line in done.stdout.splitlines()} == {"export"}
    assert "unpacked to" in done.stderr
    (tmp_path / "out" / "part1.bin").unlink()
    failed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (failed.returncode, failed.stdout) == (1, "") and "part1.bin" in failed.stderr
