"""Accuracy: last word, last token and perplexity, paired against fp32."""
