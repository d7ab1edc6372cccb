"""What tests of hostile input share: a clock that ends the process where one hangs."""

import faulthandler

import pytest
from _pytest.faulthandler import fault_handler_stderr_fd_key


@pytest.fixture
def restart_clock(request):
    """A test that takes four minutes ends the process, with a traceback; a call begins anew."""

    def restart():
        faulthandler.dump_traceback_later(240, exit=True, file=request.config.stash[fault_handler_stderr_fd_key])

    restart()
    yield restart
    faulthandler.cancel_dump_traceback_later()
