//! The door: a request's identity and attributes against the policy of this moment.
//!
//! The policy is built when the first request asks, and again when a role or a binding has changed since: a
//! binding counts for the next request after its write was answered. Nothing runs in the background, and
//! while nothing is written a request costs one comparison of revisions and a few look-ups.

use std::sync::{Arc, Mutex, PoisonError};

use gantry_api::k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding, Role, RoleBinding};
use gantry_api::status::{Details, Reason, Status};

use super::{Attributes, Grant, Policy};
use crate::server::audit;
use crate::server::identity::Identity;
use crate::server::object::decode;
use crate::server::registry::{Registry, Resource, kind_of};
use crate::store::{Revision, Store, Watch};

/// Store keys of roles and their bindings; and of those of the cluster.
const PREFIXES: [&str; 2] = ["/registry/role", "/registry/clusterrole"];
/// Builds of the policy while the store changes faster than it can be read.
const ATTEMPT_COUNT_MAX: usize = 8;

/// The policy, kept as long as it is true.
#[derive(Default)]
pub(crate) struct Access {
    built: Mutex<Option<Built>>,
}

struct Built {
    policy: Arc<Policy>,
    /// The store has been looked at up to here.
    revision: Revision,
    watches: Vec<Watch>,
}

impl Built {
    /// Looks at what was written since; `false`: a role or a binding is among it.
    fn is_true(&mut self, store: &Store) -> bool {
        let revision = store.revision();
        if revision == self.revision {
            return true;
        }
        self.revision = revision;
        // The look moves each watch on, so no change is looked at twice.
        self.watches
            .iter_mut()
            .all(|watch| matches!(watch.try_next(), Ok(None)))
    }
}

impl Access {
    /// What is true now.
    fn policy(&self, store: &Store) -> Result<Arc<Policy>, Status> {
        let mut built = self.built.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(built) = built.as_mut()
            && built.is_true(store)
        {
            return Ok(Arc::clone(&built.policy));
        }
        *built = None;
        for _ in 0..ATTEMPT_COUNT_MAX {
            let revision = store.revision();
            // Before the lists: what is written between is read twice, not missed.
            let watches = PREFIXES.iter().map(|prefix| store.watch(prefix, revision));
            let Ok(watches) = watches.collect::<Result<Vec<_>, _>>() else {
                continue;
            };
            let policy = Arc::new(build(store)?);
            *built = Some(Built {
                policy: Arc::clone(&policy),
                revision,
                watches,
            });
            return Ok(policy);
        }
        Err(Status::unavailable(
            "roles are changing too fast to be read; please try again",
        ))
    }
}

fn build(store: &Store) -> Result<Policy, Status> {
    Ok(Policy::new(
        &all::<ClusterRole>(store)?,
        &all::<Role>(store)?,
        &all::<ClusterRoleBinding>(store)?,
        &all::<RoleBinding>(store)?,
    ))
}

/// All objects of a kind; one that cannot be read gives nothing to anybody.
fn all<K: Resource>(store: &Store) -> Result<Vec<K>, Status> {
    let (_, entries) = store.list(&kind_of::<K>()?.store_prefix(None));
    let objects = entries.iter().filter_map(|entry| {
        decode(entry)
            .inspect_err(|status| tracing::error!(key = %entry.key, %status, "it gives no rights"))
            .ok()
    });
    Ok(objects.collect())
}

/// Who is allowed, and by what.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Verdict {
    Allowed(Arc<str>),
    Refused,
}

impl Registry {
    /// The policy of this moment.
    pub(crate) fn policy(&self) -> Result<Arc<Policy>, Status> {
        self.inner.access.policy(&self.inner.store)
    }

    /// Whether the caller may do this, and why.
    pub(crate) fn verdict(&self, who: &Identity, what: &Attributes<'_>) -> Result<Verdict, Status> {
        if who.is_master() {
            return Ok(Verdict::Allowed("group system:masters".into()));
        }
        // Agents have the feed, where each speaks for its own node; no binding gives them more.
        if who.is_node() {
            return Ok(Verdict::Refused);
        }
        let policy = self.policy()?;
        let grant = policy.allows(&who.user, &who.groups, what);
        let by = |grant: &Grant| Verdict::Allowed(Arc::clone(&grant.by));
        Ok(grant.map_or(Verdict::Refused, by))
    }

    /// Lets the caller do this, or says that they cannot.
    pub(crate) fn authorize(&self, who: &Identity, what: &Attributes<'_>) -> Result<(), Status> {
        match self.verdict(who, what)? {
            Verdict::Allowed(_) => Ok(()),
            Verdict::Refused => {
                let status = refusal(who, what);
                tracing::info!(user = %who.user, reason = %status.message, "refused");
                Err(status)
            }
        }
    }
}

impl Registry {
    /// As [`Registry::authorize`], and notes it: for services whose requests are noted nowhere else.
    pub(crate) fn authorize_noted(
        &self,
        who: &Identity,
        what: &Attributes<'_>,
    ) -> Result<(), Status> {
        let result = self.authorize(who, what);
        audit::note(self.audit(), who, what, &result);
        result
    }
}

/// The caller, whom the door has put into the request.
pub(crate) fn caller<T>(request: &tonic::Request<T>) -> Result<Identity, Status> {
    let identity = request.extensions().get::<Identity>().cloned();
    identity.ok_or_else(|| Status::unauthorized("the request has no identity"))
}

/// What a refusal says, in Kubernetes' words.
pub(super) fn refusal_text(who: &Identity, what: &Attributes<'_>) -> String {
    let place = match what.namespace {
        "" => "at the cluster scope".to_owned(),
        namespace => format!("in the namespace {namespace:?}"),
    };
    format!(
        "User {:?} cannot {} resource {:?} in API group {:?} {place}",
        who.user,
        what.verb,
        what.resource_text(),
        what.group
    )
}

fn refusal(who: &Identity, what: &Attributes<'_>) -> Status {
    let mut subject = what.resource.to_owned();
    if !what.group.is_empty() {
        subject = format!("{subject}.{}", what.group);
    }
    if !what.name.is_empty() {
        subject = format!("{subject} {:?}", what.name);
    }
    let text = format!("{subject} is forbidden: {}", refusal_text(who, what));
    let mut status = Status::new(Reason::Forbidden, text);
    *status.details = Details {
        name: what.name.to_owned(),
        group: what.group.to_owned(),
        kind: what.resource.to_owned(),
        ..Details::default()
    };
    status
}
