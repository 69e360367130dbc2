//! One control loop per kind.
