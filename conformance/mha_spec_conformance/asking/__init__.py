"""How a target is asked: questions, the calls that they become, and the processes that answer them."""
