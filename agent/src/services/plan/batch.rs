//! Which writes of a plan may be one system call.
//!
//! ```text
//!  backend, slots, SWITCH, backend, slots, SWITCH, retire   the plan
//!  backend, slots, backend, slots, [SWITCH, SWITCH], retire   as it is performed
//! ```
//! Backends and slots are written through memory and cost no call; frontends do. A switch may wait for the
//! backends and slots of later sets, because nothing that it refers to is among them: within a plan an id or
//! a range is written once, and what was left is free again only after the plan. It waits for nothing else,
//! so that all other steps find it done. Each is still a switch of its own for those who read.
//!
//! Where slots of a present range are overwritten (the exception of the parent's header), a frontend that
//! leaves it may still be waiting: it then resolves to fewer of its old backends, as those that stay do.

use ebpf_maps::services::{FrontendKey, FrontendValue};

use super::Step;

/// What is written next.
#[derive(Debug)]
pub enum Write<'a> {
    /// FRONTENDS[keys[n]] = values[n], in this order; as many of the ones as of the others.
    Switches(&'a [FrontendKey], &'a [FrontendValue]),
    /// Any other step.
    One(&'a Step),
}

/// Hands out all writes of a plan, in an order that is as good as that of its steps.
///
/// * `most` – switches at once, at least 1.
///
/// # Errors
/// The first of `write`; then nothing more is handed out.
pub fn in_batches<E>(
    steps: &[Step],
    most: usize,
    mut write: impl FnMut(Write<'_>) -> Result<(), E>,
) -> Result<(), E> {
    let (mut keys, mut values) = (Vec::new(), Vec::new());
    for step in steps {
        if let Step::SetFrontend { key, value } = step {
            keys.push(*key);
            values.push(*value);
        }
        let is_due = match step {
            Step::SetFrontend { .. } => keys.len() >= most,
            Step::WriteBackend { .. } | Step::WriteSlots { .. } => false,
            _ => !keys.is_empty(),
        };
        if is_due {
            write(Write::Switches(&keys, &values))?;
            keys.clear();
            values.clear();
        }
        if !matches!(step, Step::SetFrontend { .. }) {
            write(Write::One(step))?;
        }
    }
    match keys.is_empty() {
        true => Ok(()),
        false => write(Write::Switches(&keys, &values)),
    }
}
