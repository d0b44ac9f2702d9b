"""The reader of WebDataset tars. It imports `datasets`, so it is imported only where tars are read."""

from __future__ import annotations

from datasets.packaged_modules.webdataset.webdataset import WebDataset

from ..utils.unique_names import load_json


class UniqueNamesWebDataset(WebDataset):
    """The reader of `datasets`, but JSON that holds a name twice is refused, where it would keep the last one."""

    DECODERS = WebDataset.DECODERS | {"json": load_json, "jsn": load_json}
