"""Is it better? The sides of a comparison, who judges them, and the pages that show it."""
