//! The command line of `gantry-control`, parsed and checked before anything is opened.
