from hypothesis import settings

settings.register_profile("reproducible", deadline=None, derandomize=True, max_examples=30, database=None)
settings.load_profile("reproducible")
