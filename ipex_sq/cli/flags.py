"""Command-line flags made from the config dataclasses, so that each default stands once."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from ipex_sq.config import flag_settings
from ipex_sq.distributed import processes
from ipex_sq.errors import ConfigError

Config = TypeVar("Config")


class _Switch(argparse.Action):
    """A flag that is True as --name, False as --no_name, and its default where neither is given."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any) -> None:
        """As argparse calls it, for a flag in both spellings."""
        names = [text.removeprefix("--") for text in option_strings]
        self._off = [f"--no{'-' if '-' in name else '_'}{name}" for name in names]
        super().__init__([*option_strings, *self._off], dest, nargs=0, **options)

    def __call__(
        self,
        _parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        _values: Any,
        option_string: str | None = None,
    ) -> None:
        """Set what the spelling says."""
        setattr(namespace, self.dest, option_string not in self._off)


class Parser(argparse.ArgumentParser):
    """An argument parser that raises `ConfigError` and takes --kebab-case for --snake_case."""

    def __init__(self, description: str, examples: str, *, shared: bool = False) -> None:
        """`shared`: processes of torchrun may share the work of the command."""
        self._shared = shared
        super().__init__(
            prog=_program(),
            description=description,
            epilog=f"examples:\n{examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.register("action", "switch", _Switch)

    def parse_args(self, *arguments: Any, **options: Any) -> Any:
        """As argparse, for a command that runs alone or shares its work.

        Raises:
            ConfigError: A flag is wrong, or torchrun started several processes of such a command.
        """
        found = super().parse_args(*arguments, **options)
        if processes() > 1 and not self._shared:
            raise ConfigError("only eval_lambada shares its work: start this without torchrun")
        return found

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage: one clear line is enough."""
        raise ConfigError(f"{message} (see --help)")

    def add_flag(self, name: str, **options: Any) -> None:
        """Add `--name` in both spellings."""
        spellings = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
        self.add_argument(*spellings, dest=name, **options)

    def add_config(self, config_class: type, *, skip: tuple[str, ...] = ()) -> None:
        """Add a flag for every setting of a config class."""
        for setting in flag_settings(config_class):
            if setting.name in skip:
                continue
            options: dict[str, Any] = dict(setting.metadata["flag"])
            text = str(setting.metadata["help"]).replace("%", "%%")
            if setting.default is not None and "action" not in options:
                text += f" (default: {setting.default})"
            self.add_flag(setting.name, default=setting.default, help=text, **options)


def _program() -> str | None:
    """How the command was called, where argparse would name the file `__main__.py`."""
    as_module = Path(sys.argv[0]).name == "__main__.py"
    return f"python -m ipex_sq {sys.argv[1]}" if as_module and len(sys.argv) > 1 else None


def argument(parse: Callable[[str], Config]) -> Callable[[str], Config]:
    """The same parser of a flag's text, with errors that argparse prefixes with the flag."""

    def parsed(text: str) -> Config:
        try:
            return parse(text)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parsed


def build(config_class: type[Config], arguments: argparse.Namespace, **changes: Any) -> Config:
    """Make a config from parsed flags; `changes` override them."""
    names = {item.name for item in fields(config_class)}  # type: ignore[arg-type]
    values = {name: value for name, value in vars(arguments).items() if name in names}
    return config_class(**(values | changes))
