"""The recipe of the embedded model `tiny`: corpus, tokenizer, training, evaluation, export.

Not part of the wheel. Run the modules in that order, each with `python -m`, from the folder above this one.
"""
