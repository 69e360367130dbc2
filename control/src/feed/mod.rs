//! What each node must know, as one stream per agent.
