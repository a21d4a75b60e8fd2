from . import MODELS, write

for name in MODELS:
    write(name)
