"""The recipe of the embedded model `tiny`: corpus, tokenizer, training, evaluation, export. Not part of the wheel."""
