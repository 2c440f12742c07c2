"""One optimizer step in plain torch: penalties, coherence, gate, schedule, and the regularizer."""
