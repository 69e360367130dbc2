//! The cluster's certificates: one CA, the server's certificate, the first client credentials.
