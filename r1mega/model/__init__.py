"""The decoder: DeepSeek-V3's, and the same with grouped-query attention."""
