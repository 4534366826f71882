"""What comes from strangers, checked before anything else sees it: documents, configurations, code.

A model folder, a recipe or a data set may have been made by anybody, or be damaged. Every reader of JSON and YAML in
this package goes through here, so that what it gets is bounded (bytes, levels, entries, digits) and of the type that it
wants, and whatever is not gets one sentence that names the file.
"""

from edgerazor.untrusted.configuration import check_configuration, check_shapes, read_configuration
from edgerazor.untrusted.documents import (
    MOST_BYTES,
    MOST_BYTES_OF_OURS,
    MOST_ENTRIES_OF_TOKENIZERS,
    load_json,
    load_model,
    parse_json,
    read_bytes,
    read_json,
)
from edgerazor.untrusted.model_code import FILES as CODE_FILES
from edgerazor.untrusted.model_code import code_fields, refuse_code, without_code
from edgerazor.untrusted.yaml_documents import YamlError, parse_yaml

__all__ = [
    "CODE_FILES",
    "MOST_BYTES",
    "MOST_BYTES_OF_OURS",
    "MOST_ENTRIES_OF_TOKENIZERS",
    "YamlError",
    "check_configuration",
    "check_shapes",
    "code_fields",
    "load_json",
    "load_model",
    "parse_json",
    "parse_yaml",
    "read_bytes",
    "read_configuration",
    "read_json",
    "refuse_code",
    "without_code",
]
