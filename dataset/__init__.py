"""The folder of pairs: made row by row, killed at any moment, shared by jobs (`folder`, `rows`); read (`reader`)."""
