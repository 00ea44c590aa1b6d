"""What a person looks at: pictures of cases, charts, galleries, the report, the table on the console.

Everything is drawn from saved numbers and maps; nothing in here computes a measure, and nothing needs PyTorch.
"""
