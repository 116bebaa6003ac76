"""How a command ends: one line on stderr and a code for every way that it can fail."""

import errno
import sys
from collections.abc import Callable
from typing import Any

from safetensors import SafetensorError
from typer.exceptions import TyperException

from compress.core.errors import CompressError

INPUT, INTERRUPTED = 2, 130
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def exit_code(run: Callable[[], Any]) -> Any:
    """What a command returns, or the code of its failure, which is said in one line."""
    try:
        code = run()
    except CompressError as error:
        code = failed(str(error), error.exit_code)
    except TyperException as error:
        message = error.format_message() if hasattr(error, "format_message") else str(error)
        message = message.replace("Value error, ", "")
        code = failed(f"{message} (compress --help shows the commands)", INPUT)
    except KeyboardInterrupt:
        code = INTERRUPTED
    except SafetensorError as error:
        code = failed(f"weights could not be read or written: {error}", INPUT)
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        hint = "; make room and run the same command again" if error.errno in FULL else ""
        code = failed(f"{error.strerror or error}{where}{hint}", INPUT)
    if code == INTERRUPTED:
        failed("interrupted; the same command continues", code)
    return code


def failed(message: str, code: int) -> int:
    """Say in one line on stderr why the command ends; gives the code back."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code
