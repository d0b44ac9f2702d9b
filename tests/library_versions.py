"""Which versions of the libraries belong together."""

import peft
import pytest
import transformers
from packaging.version import Version
from transformers.integrations.peft import MIN_PEFT_VERSION


loads_whole_parts = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"),
    reason="transformers 5.17 loads no parts that an adapter holds whole; those in between were not tried",
)
loads_tokenizers_of_subfolders = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"),
    reason="transformers 5.17 loads no tokenizer from a subfolder of a repository that has no config of a model",
)
matching_peft = pytest.mark.skipif(
    Version(peft.__version__) < Version(MIN_PEFT_VERSION),
    reason=f"this transformers wants PEFT {MIN_PEFT_VERSION}, and PEFT {peft.__version__} is here",
)
