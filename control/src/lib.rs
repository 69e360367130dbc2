//! Gantry's control plane: one process with the store, the API, the scheduler, the controllers and
//! the feed.
//!
//! ```text
//!  gantry, tools ──gRPC──► server ──► registry ──► store (durable before the answer)
//!                                        ▲             │ watch
//!                    scheduler, controllers ◄──────────┤
//!                                        ▲             ▼
//!                 agents ──one stream each──► feed ◄───┘
//! ```
//! Invariants: only `store` touches the disk; every write of anyone passes `server::registry`, which
//! defaults, validates and admits it; scheduler and controllers keep no state of their own.

#![forbid(unsafe_code)]

pub mod certificates;
pub mod config;
pub mod controllers;
pub mod feed;
pub mod hold;
pub mod joining;
pub mod open_files;
pub mod pki;
pub mod ranges;
pub mod restore;
pub mod run;
pub mod scheduler;
pub mod server;
pub mod store;
