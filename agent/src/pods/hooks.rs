//! Lifecycle hooks: postStart beside the container's first steps, preStop before its SIGTERM.
//!
//! Neither has a limit of its own: postStart ends with its container, preStop with the grace period,
//! when the worker drops the future. As with the kubelet, any answer to an httpGet is a success.

use std::time::Duration;

use gantry_api::k8s_openapi::api::core::v1::LifecycleHandler;

use super::check::Target;

/// Which hook.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Hook {
    /// Right after the container's start.
    PostStart,
    /// Before it is asked to stop.
    PreStop,
}

/// The handler of a hook of this container.
pub fn handler(target: &Target, hook: Hook) -> Option<LifecycleHandler> {
    let lifecycle = target.config.lifecycle.clone()?;
    match hook {
        Hook::PostStart => lifecycle.post_start,
        Hook::PreStop => lifecycle.pre_stop,
    }
}

/// Runs one hook to its end; the words say why it failed.
pub async fn run(target: &Target, hook: Hook) -> Result<(), String> {
    let Some(handler) = handler(target, hook) else {
        return Ok(());
    };
    if let Some(exec) = handler.exec {
        return target.exec(exec.command.unwrap_or_default()).await;
    }
    if let Some(get) = handler.http_get {
        return target.http(&get).await.map(|_| ());
    }
    if let Some(sleep) = handler.sleep {
        tokio::time::sleep(Duration::from_secs(sleep.seconds.max(0) as u64)).await;
        return Ok(());
    }
    // Refused by the API: only an object from elsewhere can ask for it.
    Err("the hook names no exec, httpGet or sleep; tcpSocket is not supported".into())
}
