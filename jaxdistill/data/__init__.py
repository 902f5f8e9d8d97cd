"""Text to batches: tokenizer, sources, the token store and its reader."""

from jaxdistill.data.masking import NOT_PREDICTED, Masking, mask_tokens
from jaxdistill.data.order import RowOrder
from jaxdistill.data.prepare import is_held_out, prepare
from jaxdistill.data.reader import Batch, RowSource, TokenStore, batches, held_out_rows
from jaxdistill.data.rows import pack_documents
from jaxdistill.data.sources import DocumentCounts, read_documents, read_labelled, source_fingerprint
from jaxdistill.data.tokenizer import TextTokenizer, check_tokenizer, load_tokenizer, save_tokenizer

__all__ = [
    "NOT_PREDICTED",
    "Batch",
    "DocumentCounts",
    "Masking",
    "RowOrder",
    "RowSource",
    "TextTokenizer",
    "TokenStore",
    "batches",
    "check_tokenizer",
    "held_out_rows",
    "is_held_out",
    "load_tokenizer",
    "mask_tokens",
    "pack_documents",
    "prepare",
    "read_documents",
    "read_labelled",
    "save_tokenizer",
    "source_fingerprint",
]
