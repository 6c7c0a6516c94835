//! Storage that is slow, fails, and gives ambiguous results, around any other: the engine must behave on it.
