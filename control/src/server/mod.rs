//! The API: one TLS port, the gRPC services, and the registry that every write passes.

mod allocation;
mod event;
pub mod identity;
mod object;
pub mod registry;
mod rules;
mod schema;
mod service;
mod write;

pub use object::{decode, present, to_value};
pub use registry::Registry;
pub use rules::Part;
pub use write::{WriteOptions, Written};
