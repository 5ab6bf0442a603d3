"""Pictures of a simulated schedule: ``terminal`` (text), ``picture`` (PNG) and ``trace`` (for Perfetto)."""
