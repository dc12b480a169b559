"""The test suite. A regular package, so that no installed `tests` can stand in for it."""
