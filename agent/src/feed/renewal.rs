//! The node's certificate is renewed over its own connection, and the stream moves to the new one.
//!
//! ```text
//!  client.pem ─► due at about two thirds of its life ─► new key, Renew on the open connection ─► client.pem
//!                                                                     stream ends ◄─ moves ◄──────┘
//!                                                                        └─► dials with the new one
//! ```
//! A stream moves as soon as no tunnel (exec, logs, a copy) runs on it, or when the old certificate is near
//! its end. Nothing else notices: the view stays, statuses are sent again. Pods run on whatever happens; a
//! certificate that has ended needs `gantry join` again.
//!
//! These are wall-clock times, as X.509 has them; nothing else of the feed looks at that clock.

use std::time::Duration;

use gantry_api::proto;
use gantry_api::proto::joining_client::JoiningClient;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{Config, Shared, lock};
use crate::credentials::{self, Held, unix_seconds};

/// The longest sleep: files and clocks may change meanwhile.
const LOOK_MAX: Duration = Duration::from_secs(10 * 60);
/// Between two tries that fail: this part of the certificate's life.
const TRIES_PER_LIFE: i64 = 50;
const RETRY_MIN: Duration = Duration::from_millis(200);
const RETRY_MAX: Duration = Duration::from_secs(5 * 60);
const CALL_TIMEOUT: Duration = Duration::from_secs(20);

/// When to renew, Unix time: between 62 and 72 % of the certificate's life, by `jitter` from 0 to 1, so
/// that nodes that joined together do not renew together.
fn due_s(held: &Held, jitter: f64) -> i64 {
    let life = held.not_after_s.saturating_sub(held.not_before_s).max(0);
    let part = 6_200 + (1_000.0 * jitter.clamp(0.0, 1.0)) as i64;
    let part = life / 10_000 * part + life % 10_000 * part / 10_000;
    held.not_before_s.saturating_add(part)
}

/// The wait between two tries that fail.
fn retry(held: &Held) -> Duration {
    let life = held.not_after_s.saturating_sub(held.not_before_s).max(0);
    let part = u64::try_from(life / TRIES_PER_LIFE).unwrap_or(0);
    Duration::from_secs(part).clamp(RETRY_MIN, RETRY_MAX)
}

/// How long the stream may stay on the old certificate: three quarters of what is left of it.
fn move_within(held: &Held, now_s: i64) -> Duration {
    let left = held.not_after_s.saturating_sub(now_s);
    Duration::from_secs(u64::try_from(left).unwrap_or(0)) * 3 / 4
}

/// Renews whenever it is due, until `shutdown`. A node with credentials of another kind is left alone.
pub(super) async fn run(
    config: Config,
    shared: std::sync::Arc<Shared>,
    shutdown: CancellationToken,
) {
    let mut jitter = (0, 0.0);
    loop {
        let wait = match credentials::joined(&config.credentials) {
            Ok(None) => LOOK_MAX,
            Ok(Some(held)) => {
                if jitter.0 != held.not_after_s {
                    jitter = (held.not_after_s, rand::random::<f64>());
                }
                let left = due_s(&held, jitter.1).saturating_sub(unix_seconds());
                match u64::try_from(left) {
                    Ok(left @ 1..) => Duration::from_secs(left).min(LOOK_MAX),
                    _ => match renew(&config, &shared, &held).await {
                        Ok(()) => Duration::ZERO,
                        Err(reason) => {
                            let end_s = held.not_after_s;
                            tracing::warn!(
                                node = config.node,
                                reason,
                                end_s,
                                "the node's certificate was not renewed, trying again"
                            );
                            retry(&held)
                        }
                    },
                }
            }
            Err(error) => {
                tracing::error!(node = config.node, %error, "the node's certificate");
                LOOK_MAX
            }
        };
        tokio::select! {
            // Both arms are cancel safe.
            () = tokio::time::sleep(wait) => {}
            () = shutdown.cancelled() => return,
        }
    }
}

async fn renew(config: &Config, shared: &Shared, held: &Held) -> Result<(), String> {
    let channel = lock(&shared.channel).clone();
    let channel = channel.ok_or("there is no connection to the control plane")?;
    let request = credentials::request(&config.node).map_err(|error| error.to_string())?;
    let message = proto::RenewRequest {
        request_der: request.der.into(),
    };
    let mut client = JoiningClient::new(channel);
    let reply = tokio::time::timeout(CALL_TIMEOUT, client.renew(message)).await;
    let reply = reply
        .map_err(|_| "no answer".to_owned())?
        .map_err(|status| status.message().to_owned())?
        .into_inner();
    let (directory, key) = (config.credentials.clone(), request.key);
    let certificate = reply.certificate_pem;
    let written = tokio::task::spawn_blocking(move || {
        credentials::write_renewed(&directory, &certificate, &key)
    });
    let written = written.await.map_err(|error| error.to_string())?;
    written.map_err(|error| error.to_string())?;
    tracing::info!(
        node = config.node,
        end_s = reply.not_after_s,
        "the node has a new certificate"
    );
    let deadline = Instant::now() + move_within(held, unix_seconds());
    *lock(&shared.move_by) = Some(deadline);
    shared.wake.notify_one();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn held(life_s: i64) -> Held {
        Held {
            node: "n".into(),
            not_before_s: 1_000,
            not_after_s: 1_000 + life_s,
        }
    }

    #[test]
    fn it_is_due_around_two_thirds_of_its_life() {
        assert_eq!(due_s(&held(1_000), 0.0), 1_620);
        assert_eq!(due_s(&held(1_000), 1.0), 1_720);
        assert_eq!(retry(&held(10)), RETRY_MIN);
        assert_eq!(retry(&held(14 * 24 * 3600)), RETRY_MAX);
        assert_eq!(move_within(&held(100), 1_060), Duration::from_secs(30));
        assert_eq!(move_within(&held(100), 2_000), Duration::ZERO);
    }

    proptest! {
        /// Many tries are left between the first one and the end, whatever the life.
        #[test]
        fn there_is_time_for_more_tries(life_s in 5_i64..40_000_000, jitter in 0.0..1.0_f64) {
            let held = held(life_s);
            let left_s = held.not_after_s - due_s(&held, jitter);
            prop_assert!(left_s * 4 >= life_s, "{left_s} of {life_s}");
            prop_assert!(retry(&held) * 3 <= Duration::from_secs(left_s.unsigned_abs()));
        }
    }
}
