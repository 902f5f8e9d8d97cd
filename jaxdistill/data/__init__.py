"""Text to batches: tokenizer, sources, the token store and its reader."""

from jaxdistill.data.masking import NOT_PREDICTED, Masking, mask_tokens
from jaxdistill.data.mixture import LanguageShare, language_numbers, language_shares, language_tokens, languages, row_order
from jaxdistill.data.order import RowOrder
from jaxdistill.data.prepare import prepare
from jaxdistill.data.reader import Batch, RowSource, TokenStore, batches, held_out_rows
from jaxdistill.data.rows import pack_documents
from jaxdistill.data.sources import DocumentCounts, read_documents, read_labelled, source_fingerprint, source_name
from jaxdistill.data.split import is_held_out
from jaxdistill.data.stream import TextStream, open_stream
from jaxdistill.data.tokenizer import TextTokenizer, check_tokenizer, load_tokenizer, save_tokenizer

__all__ = [
    "NOT_PREDICTED",
    "Batch",
    "DocumentCounts",
    "LanguageShare",
    "Masking",
    "RowOrder",
    "RowSource",
    "TextStream",
    "TextTokenizer",
    "TokenStore",
    "batches",
    "check_tokenizer",
    "held_out_rows",
    "is_held_out",
    "language_numbers",
    "language_shares",
    "language_tokens",
    "languages",
    "load_tokenizer",
    "mask_tokens",
    "open_stream",
    "pack_documents",
    "prepare",
    "read_documents",
    "read_labelled",
    "row_order",
    "save_tokenizer",
    "source_fingerprint",
    "source_name",
]
