"""GSM8K and TruthfulQA through lm-evaluation-harness: questions, models, results, their cache."""
