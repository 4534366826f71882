"""Text or conversations -> token batches in a fixed order.

A source (a file or a data set of the hub) gives documents; a document becomes the tokenizer's tokens: a text with its
own special tokens and an end-of-text token, a conversation as the tokenizer's chat template writes it. The tokens of a
source are cut into rows, which are mixed, shuffled and shared out in an order that is a function of the seed.
"""

from edgerazor.data.chat import (
    Conversation,
    check_options,
    parse_conversation,
    question_opening,
    render,
    template_variables,
    thinking_options,
    turn_ends,
)
from edgerazor.data.held_out import split_held_out
from edgerazor.data.opening import RowSettings, open_rows
from edgerazor.data.packing import Packing
from edgerazor.data.picture_chat import (
    PictureTokens,
    answer_tokens,
    encode_with_pictures,
    placeholder_in_text,
    prompt_with_pictures,
    runs,
    text_with_pictures,
    tokenizer_of,
)
from edgerazor.data.rows import Batch, Mixture, TokenRows, sample_batches
from edgerazor.data.sources import END_OF_TEXT, documents, fingerprint
from edgerazor.data.tokens import MASKED, Tokens, around_text, prefix_of, tokenize

__all__ = [
    "END_OF_TEXT",
    "MASKED",
    "Batch",
    "Conversation",
    "Mixture",
    "Packing",
    "PictureTokens",
    "RowSettings",
    "TokenRows",
    "Tokens",
    "answer_tokens",
    "around_text",
    "check_options",
    "documents",
    "encode_with_pictures",
    "fingerprint",
    "open_rows",
    "parse_conversation",
    "placeholder_in_text",
    "prefix_of",
    "prompt_with_pictures",
    "question_opening",
    "render",
    "runs",
    "sample_batches",
    "split_held_out",
    "template_variables",
    "text_with_pictures",
    "thinking_options",
    "tokenize",
    "tokenizer_of",
    "turn_ends",
]
