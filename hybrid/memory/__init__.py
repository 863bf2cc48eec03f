"""Memories: which prompts of the run come again, which of its responses are learnt from again; and datastores."""

from hybrid.memory.chain import Chain
from hybrid.memory.datastore import Datastore, DatastoreInfo, KeyDtype, Search, check_place, filled_datastore
from hybrid.memory.experience import Experience
from hybrid.memory.keep import MEMORY, load_memory, read_memory, write_memory
from hybrid.memory.listing import memory_tables
from hybrid.memory.markov import MarkovMemory
from hybrid.memory.memory import Memory, check_memory, make_memory, memory_names, register_memory
from hybrid.memory.visits import Kept, Visit, example_key, prompt_key, visits_of

__all__ = [
    "MEMORY",
    "Chain",
    "Datastore",
    "DatastoreInfo",
    "Experience",
    "Kept",
    "KeyDtype",
    "MarkovMemory",
    "Memory",
    "Search",
    "Visit",
    "check_memory",
    "check_place",
    "example_key",
    "filled_datastore",
    "load_memory",
    "make_memory",
    "memory_names",
    "memory_tables",
    "prompt_key",
    "read_memory",
    "register_memory",
    "visits_of",
    "write_memory",
]
