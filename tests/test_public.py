"""One way in: the public names."""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
import subprocess
import sys

import flowstream as fs


def test_all_is_sorted_and_complete():
    assert fs.__all__ == sorted(fs.__all__, key=lambda name: (name[0].islower(), name))
    for name in fs.__all__:
        public = getattr(fs, name)
        assert public.__doc__, name
        assert public.__doc__.strip(), name


def test_every_module_says_what_it_is_in_its_first_line():
    for module in pkgutil.walk_packages(fs.__path__, "flowstream."):
        if not module.name.endswith("__main__"):
            first = (importlib.import_module(module.name).__doc__ or "").strip().splitlines()
            assert first, module.name
            assert len(first[0]) > 10, module.name


def test_pure_parts_import_no_stream():
    pure = ("digest", "window", "policies", "samplers", "losses", "temperature", "metrics", "recollate")
    pure += ("linear_cross_entropy",)
    code = f"import sys; [__import__('flowstream.' + name) for name in {pure}]; print('\\n'.join(sys.modules))"
    program = code.replace(
        "import sys;",
        "import sys, types; m = types.ModuleType('flowstream'); "
        f"m.__path__ = {list(fs.__path__)!r}; sys.modules['flowstream'] = m;",
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    assert "flowstream.digest" in loaded
    assert "flowstream.stream" not in loaded
    assert "flowstream.epoch" not in loaded
    assert "transformers" not in loaded


def test_the_core_needs_no_extra():
    required = importlib.metadata.requires("flowstream") or []
    core = {line.split(">")[0].split(";")[0].strip() for line in required if "extra ==" not in line}
    assert core == {"torch", "transformers", "webdataset", "numpy", "lmdb", "xxhash", "tyro", "rich"}
