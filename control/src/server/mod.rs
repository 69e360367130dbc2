//! The API: one TLS port, the gRPC services, and the registry that every write passes.
