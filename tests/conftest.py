"""Every test runs offline, on one thread, and without progress bars."""

import gc
import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Ray lets everything else go first, so that its processes would wait for the tests beside them.
os.environ.setdefault("RAY_worker_niceness", "0")

import pytest  # noqa: E402
import torch  # noqa: E402  (the libraries read the environment when they are imported)
import transformers  # noqa: E402


torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="module", autouse=True)
def freeze_what_stays():
    """What was imported stays, so that no later collection of garbage looks at it: each training asks for one."""
    gc.collect()
    gc.freeze()
