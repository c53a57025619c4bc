"""`megascale COMMAND …`, also `python -m megascale COMMAND …`: what is asked of a run besides its jobs."""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from megascale import checkpoint_commands, doctor_command, export_commands
from megascale.errors import ConfigError, MegascaleError
from megascale.stopping import stop_on_signal


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog}: {message}; see --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code: 0 done, 2 bad input or something found damaged, 75 stopped by a signal."""
    parser = _Parser(
        prog="megascale",
        description="Looks after what jobs need and leave behind. The jobs themselves: megascale-pretrain --help, and so on.",
        epilog="Exit codes: 0 done, 2 bad input, a damaged checkpoint or a check that failed, 75 stopped by a signal.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    checkpoint_commands.add_to(commands)
    export_commands.add_to(commands)
    doctor_command.add_to(commands)
    try:
        arguments = parser.parse_args(argv)
        stop_on_signal()
        return int(arguments.run(arguments) or 0)
    except MegascaleError as failure:
        print(f"{type(failure).__name__}: {failure}", file=sys.stderr, flush=True)
        return failure.exit_code


if __name__ == "__main__":
    sys.exit(main())
