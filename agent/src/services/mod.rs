//! Services, as far as they can be decided without a kernel.
//!
//! ```text
//!  two Views ─► changed ─► View.services ⋈ View.backends ─► index ─► [BackendSet] ─► plan ─► [Step] ─► dataplane
//!                                                            per Service     ▲ arena, maglev
//! ```
//! Everything here is pure: values in, values out, the time is an argument. An endpoint of the API
//! becomes a backend in [`index`] and nowhere else; what must be written, and in which order so
//! that no connection ever meets a half-programmed Service, is decided in [`plan`].

pub mod announce;
pub mod arena;
pub mod changed;
pub mod counts;
pub mod ejection;
pub mod gone;
pub mod host_port;
pub mod index;
pub mod liveness;
pub mod maglev;
pub mod plan;
pub mod shown;
