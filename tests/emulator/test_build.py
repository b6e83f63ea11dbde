"""What was compiled is kept, and compiled again when anything that it was made of changes."""

import ctypes

import pytest
from emulator import build


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A source that includes a header."""
    monkeypatch.setattr(build, "CACHE", tmp_path / "cache")
    (tmp_path / "value.h").write_text("#define VALUE 1\n")
    (tmp_path / "value.cpp").write_text(
        '#include "value.h"\nextern "C" int value() { return VALUE; }\n'
    )
    return tmp_path


def value_of(library):
    return ctypes.CDLL(str(library)).value()


def test_a_changed_header_is_noticed(sources):
    library = build.shared_library("value", [sources / "value.cpp"])
    made = library.stat().st_mtime_ns
    assert value_of(library) == 1
    (sources / "value.h").write_text("#define VALUE 2\n")
    changed = build.shared_library("value", [sources / "value.cpp"])
    assert changed != library and value_of(changed) == 2
    (sources / "value.h").write_text("#define VALUE 1\n")
    assert build.shared_library("value", [sources / "value.cpp"]) == library
    assert library.stat().st_mtime_ns == made


def test_flags_count(sources):
    (sources / "value.h").write_text("")
    one, two = (
        build.shared_library("value", [sources / "value.cpp"], [f"-DVALUE={n}"]) for n in (1, 2)
    )
    assert (value_of(one), value_of(two)) == (1, 2)


def test_what_cannot_be_compiled_or_linked_is_named(sources):
    (sources / "value.h").write_text("#define VALUE missing()\nint missing();\n")
    with pytest.raises(RuntimeError, match="value: cannot be linked"):
        build.shared_library("value", [sources / "value.cpp"])
    (sources / "value.h").write_text("#error no\n")
    with pytest.raises(RuntimeError, match=r"cannot compile .*value\.cpp"):
        build.shared_library("value", [sources / "value.cpp"])
    assert not [path for path in build.CACHE.iterdir() if path.is_dir()]
