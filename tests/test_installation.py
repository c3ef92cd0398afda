"""A missing extra is named in the way of the tool that made the environment."""

from pathlib import Path

import pytest

from lacuna.installation import install_command, pip_command

BY_PYTHON = "home = /usr/bin\ninclude-system-site-packages = false\nversion = 3.11.7\nprompt = uv = 1\n"
BY_UV = "home = /usr/bin\nimplementation = CPython\nuv = 0.13.9\nversion_info = 3.11.7\n"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "checkout" / ".venv").mkdir(parents=True)
    return tmp_path / "checkout"


def test_in_a_checkout_by_make(checkout: Path) -> None:
    (checkout / ".venv/pyvenv.cfg").write_text(BY_PYTHON)
    (checkout / ".venv/installed").touch()
    assert install_command("train", checkout / ".venv", checkout) == "make install --always-make"


def test_in_a_checkout_by_uv(checkout: Path) -> None:
    (checkout / ".venv/pyvenv.cfg").write_text(BY_UV)
    assert install_command("train", checkout / ".venv", checkout) == "uv sync --extra train"


def test_in_a_checkout_under_another_path(checkout: Path) -> None:
    (checkout / ".venv/pyvenv.cfg").write_text(BY_UV)
    link = checkout.parent / "link"
    link.symlink_to(checkout)
    assert install_command("train", link / ".venv", checkout) == "uv sync --extra train"


def test_in_a_checkout_with_an_environment_made_by_hand(checkout: Path) -> None:
    (checkout / ".venv/pyvenv.cfg").write_text(BY_PYTHON)
    assert install_command("train", checkout / ".venv", checkout) == "pip install 'lacuna[train]'"


def test_in_an_environment_of_uv_elsewhere(checkout: Path, tmp_path: Path) -> None:
    (tmp_path / "pyvenv.cfg").write_text(BY_UV)
    assert install_command("chat", tmp_path, checkout) == f"uv pip install --python {tmp_path} 'lacuna[chat]'"
    assert pip_command("uninstall", "trl", tmp_path) == f"uv pip uninstall --python {tmp_path} trl"


def test_in_an_environment_of_pip_or_conda(checkout: Path, tmp_path: Path) -> None:
    assert install_command("chat", tmp_path, checkout) == "pip install 'lacuna[chat]'"
    (tmp_path / "pyvenv.cfg").write_text(BY_PYTHON)
    (tmp_path / "installed").touch()
    assert install_command("chat", tmp_path, checkout) == "pip install 'lacuna[chat]'"
    assert pip_command("uninstall", "trl", tmp_path) == "pip uninstall trl"
