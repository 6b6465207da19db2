"""Text to batches: sources, tokenizer, tokenized shards, and the order in which a run reads them."""

from .batches import Batches as Batches
from .shards import PreparedData as PreparedData
from .shards import TokenShards as TokenShards
from .shards import prepare as prepare
from .sources import Corpus as Corpus
from .sources import open_corpus as open_corpus
from .tokenizer import Tokenizer as Tokenizer
from .tokenizer import train_tokenizer as train_tokenizer
