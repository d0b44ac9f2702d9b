"""Which versions of the libraries belong together."""

import peft
import pytest
from packaging.version import Version
from transformers.integrations.peft import MIN_PEFT_VERSION


matching_peft = pytest.mark.skipif(
    Version(peft.__version__) < Version(MIN_PEFT_VERSION),
    reason=f"this transformers wants PEFT {MIN_PEFT_VERSION}, and PEFT {peft.__version__} is here",
)
