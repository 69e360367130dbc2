//! Service accounts: every namespace has account `default` and the certificate to check the API with.
//!
//! ```text
//!  namespace, or its account removed ─► ServiceAccount default, ConfigMap kube-root-ca.crt (if absent)
//! ```
//! Pods mount the ConfigMap beside their token. Both are put back when somebody removes them.
//!
//! Source: Kubernetes `pkg/controller/serviceaccount`, `pkg/controller/certificates/rootcacertpublisher`.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use gantry_api::k8s_openapi::api::core::v1::{ConfigMap, Namespace, ServiceAccount};
use gantry_api::k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use gantry_api::status::{Reason, Status};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::informer::{Delta, ObjectKey};
use super::queue::WorkQueue;
use super::{Context, Controller};

/// The account of pods that name none.
const ACCOUNT: &str = "default";
/// The ConfigMap with the CA's certificate, in Kubernetes' name.
const ROOT_CA: &str = "kube-root-ca.crt";
/// ConfigMaps are not watched here: a removed one is put back after at most this.
const RESYNC: Duration = Duration::from_secs(30);

struct ServiceAccounts {
    context: Arc<Context>,
}

fn metadata(namespace: &str, name: &str) -> ObjectMeta {
    ObjectMeta {
        namespace: Some(namespace.to_owned()),
        name: Some(name.to_owned()),
        ..ObjectMeta::default()
    }
}

/// Somebody else made it, or the namespace is going: nothing to do.
fn settled<K>(result: Result<K, Status>) -> Result<(), Status> {
    match result {
        Ok(_) => Ok(()),
        Err(status)
            if matches!(
                status.reason,
                Reason::AlreadyExists | Reason::Forbidden | Reason::NotFound
            ) =>
        {
            Ok(())
        }
        Err(status) => Err(status),
    }
}

impl Controller for ServiceAccounts {
    const NAME: &'static str = "serviceaccount-controller";
    type Key = ObjectKey;

    async fn reconcile(&self, key: &ObjectKey) -> Result<Option<Duration>, Status> {
        let (registry, namespace) = (&self.context.registry, &key.name);
        if self.context.is_leaving(namespace) {
            return Ok(None);
        }
        if registry
            .get::<ServiceAccount>(namespace, ACCOUNT)?
            .is_none()
        {
            let account = ServiceAccount {
                metadata: metadata(namespace, ACCOUNT),
                ..ServiceAccount::default()
            };
            settled(registry.create(&account).await)?;
        }
        let certificate = &self.context.settings.ca_certificate;
        let published: Option<ConfigMap> = registry.get(namespace, ROOT_CA)?;
        let wanted = BTreeMap::from([("ca.crt".to_owned(), certificate.clone())]);
        match published {
            _ if certificate.is_empty() => {}
            None => {
                let map = ConfigMap {
                    metadata: metadata(namespace, ROOT_CA),
                    data: Some(wanted),
                    ..ConfigMap::default()
                };
                settled(registry.create(&map).await)?;
            }
            Some(map) if map.data.as_ref() != Some(&wanted) => {
                let data = Some(wanted);
                settled(registry.update(&ConfigMap { data, ..map }).await)?;
            }
            Some(_) => {}
        }
        Ok(Some(RESYNC))
    }
}

/// Starts the workers.
pub(super) fn start(context: &Arc<Context>, tasks: &mut JoinSet<()>, shutdown: &CancellationToken) {
    let queue: WorkQueue<ObjectKey> = WorkQueue::new();
    let own = queue.clone();
    context
        .caches
        .namespaces
        .on_change(move |delta: &Delta<Namespace>| {
            own.add(ObjectKey::of(&delta.object().metadata));
        });
    let removed = queue.clone();
    context
        .caches
        .service_accounts
        .on_change(move |delta: &Delta<ServiceAccount>| {
            if let Delta::Deleted(account) = delta {
                let namespace = account.metadata.namespace.clone().unwrap_or_default();
                removed.add(ObjectKey::new("", namespace));
            }
        });
    let controller = ServiceAccounts {
        context: Arc::clone(context),
    };
    super::spawn_workers(controller, &queue, 1, context, tasks, shutdown);
}
