"""Training of a reasoner so small that a test can afford it."""

SMALL = {
    "ladders": {"maps": [4, 5, 6], "programs": [3, 4]},
    "opening": [2],
    "shares": {"maps": 1, "programs": 1},
    "rise_below": {"lookups": 9.0, "maps": 0.05, "programs": 0.05},
    "model": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    },
    "matrix_learning_rate": 0.01,
    "learning_rate": 0.003,
    "tokens": 60_000,
    "decay": 0.25,
    "finish": 0.1,
    "rows": 4,
    "batch_tokens": [300, 600],
    "seed": 0,
}
