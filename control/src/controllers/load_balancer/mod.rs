//! Addresses for Services of type LoadBalancer, from the pool that gantry-control was given.
//!
//! ```text
//!  type LoadBalancer, no class ─► keep what it has and may have ─► else draw ─► status.loadBalancer
//!                                                                └ none free ─► <pending>, an event
//!  another type ─► status.loadBalancer is emptied       another class ─► not ours, left alone
//! ```
//! One worker with one key decides for all Services at once, so no two get the same address; what
//! is held is read from their statuses, so nothing is lost in a restart and nothing leaks: an
//! address is free when no Service has it. Of two with the same one the older keeps it. Without a
//! pool nothing is taken away: another controller in the cluster may be the one that gives addresses.
//!
//! Source: Kubernetes `staging/src/k8s.io/cloud-provider/controllers/service/controller.go` (which
//! Services need a load balancer, when the status is cleared).

mod pool;

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use gantry_api::k8s_openapi::api::core::v1::{
    LoadBalancerIngress, LoadBalancerStatus, Service, ServiceSpec,
};
use gantry_api::status::Status;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

pub use self::pool::{AddressPool, PoolRange};
use super::informer::{Delta, ObjectKey};
use super::queue::WorkQueue;
use super::{Context, Controller, EventType};
use pool::Cursor;

/// Whose a Service's load balancer status is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    /// Type LoadBalancer without a class: gets addresses here.
    Ours,
    /// Type LoadBalancer of another implementation.
    OtherClass,
    /// Another type: has no such status.
    Other,
}

/// What the plan needs of a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Claimant {
    role: Role,
    /// For each family it has: whether it is IPv6.
    families: Vec<bool>,
    /// spec.loadBalancerIP.
    requested: Option<IpAddr>,
    /// The addresses in its status; none for what is no address.
    held: Vec<Option<IpAddr>>,
    external_ips: Vec<IpAddr>,
}

/// What to write, and who has to wait.
#[derive(Debug, Default, PartialEq, Eq)]
struct Plan {
    /// Index of the Service and the addresses that it has from now on.
    writes: Vec<(usize, Vec<IpAddr>)>,
    /// Index of the Service and why it does not get (all) its addresses.
    pending: Vec<(usize, String)>,
}

/// Decides for all Services, the oldest first.
fn plan(pool: &AddressPool, claimants: &[Claimant]) -> Plan {
    let mut plan = Plan::default();
    let mut taken: BTreeSet<IpAddr> = BTreeSet::new();
    for claimant in claimants {
        taken.extend(&claimant.external_ips);
        if claimant.role == Role::OtherClass || pool.is_empty() {
            taken.extend(claimant.held.iter().flatten());
        }
    }
    let mut kept: Vec<Vec<IpAddr>> = Vec::with_capacity(claimants.len());
    for claimant in claimants {
        let mut own: Vec<IpAddr> = Vec::new();
        for address in claimant.held.iter().flatten() {
            let fits = claimant.role == Role::Ours
                && pool.contains(*address)
                && claimant.families.contains(&address.is_ipv6())
                && !own.iter().any(|other| other.is_ipv6() == address.is_ipv6())
                && claimant.wants(*address);
            if fits && taken.insert(*address) {
                own.push(*address);
            }
        }
        kept.push(own);
    }
    let mut cursors = [Cursor::default(), Cursor::default()];
    for (index, (claimant, mut own)) in claimants.iter().zip(kept).enumerate() {
        match claimant.role {
            Role::OtherClass => continue,
            Role::Other => {}
            Role::Ours if pool.is_empty() => {
                if claimant.held.is_empty() {
                    plan.pending.push((index, NO_POOL.to_owned()));
                }
                continue;
            }
            Role::Ours => {
                for v6 in &claimant.families {
                    if own.iter().any(|address| address.is_ipv6() == *v6) {
                        continue;
                    }
                    match find(
                        pool,
                        claimant,
                        *v6,
                        &mut taken,
                        &mut cursors[usize::from(*v6)],
                    ) {
                        Ok(address) => own.push(address),
                        Err(reason) => plan.pending.push((index, reason)),
                    }
                }
            }
        }
        let mut wanted: Vec<Option<IpAddr>> = own.iter().copied().map(Some).collect();
        let mut held = claimant.held.clone();
        wanted.sort_unstable();
        held.sort_unstable();
        if wanted != held {
            plan.writes.push((index, own));
        }
    }
    // What is given back is written before it is somebody else's.
    let held = |index: &usize| claimants[*index].held.iter().flatten();
    let given: BTreeSet<IpAddr> = plan
        .writes
        .iter()
        .flat_map(|(index, _)| held(index))
        .copied()
        .collect();
    let is_moving = |(index, own): &(usize, Vec<IpAddr>)| {
        own.iter()
            .any(|address| given.contains(address) && !held(index).any(|a| a == address))
    };
    let (moving, ready): (Vec<_>, Vec<_>) = plan.writes.iter().cloned().partition(is_moving);
    plan.writes = ready.into_iter().chain(moving).collect();
    plan
}

const NO_POOL: &str = "no address: this cluster has no pool of load balancer addresses. Start \
                       gantry-control with --load-balancer-pool CIDR, or use type NodePort";

impl Claimant {
    /// Whether it may have this address: any, unless it asks for another one of that family.
    fn wants(&self, address: IpAddr) -> bool {
        self.requested
            .is_none_or(|asked| asked == address || asked.is_ipv6() != address.is_ipv6())
    }
}

/// An address of one family, taken.
fn find(
    pool: &AddressPool,
    claimant: &Claimant,
    v6: bool,
    taken: &mut BTreeSet<IpAddr>,
    cursor: &mut Cursor,
) -> Result<IpAddr, String> {
    if let Some(asked) = claimant.requested.filter(|asked| asked.is_ipv6() == v6) {
        if !pool.contains(asked) {
            return Err(format!(
                "spec.loadBalancerIP {asked} is not in the pool of load balancer addresses: ask for \
                 one of --load-balancer-pool of gantry-control, or for none"
            ));
        }
        if !taken.insert(asked) {
            return Err(format!(
                "spec.loadBalancerIP {asked} belongs to another Service: ask for another one, or \
                 for none"
            ));
        }
        return Ok(asked);
    }
    let family = if v6 { "IPv6" } else { "IPv4" };
    let Some(address) = pool.free(v6, taken, cursor) else {
        let what = if pool.has_family(v6) {
            "every one is taken. Delete a Service, or extend"
        } else {
            "there is none. Extend"
        };
        return Err(format!(
            "no {family} address: of the pool of load balancer addresses {what} \
             --load-balancer-pool of gantry-control"
        ));
    };
    taken.insert(address);
    Ok(address)
}

fn claimant(service: &Service) -> Claimant {
    let none = ServiceSpec::default();
    let spec = service.spec.as_ref().unwrap_or(&none);
    let role = match (spec.type_.as_deref(), &spec.load_balancer_class) {
        (Some("LoadBalancer"), None) => Role::Ours,
        (Some("LoadBalancer"), Some(_)) => Role::OtherClass,
        _ => Role::Other,
    };
    let mut families: Vec<bool> = Vec::new();
    for family in spec.ip_families.iter().flatten() {
        let v6 = family == "IPv6";
        if !families.contains(&v6) {
            families.push(v6);
        }
    }
    if families.is_empty() {
        families.push(false);
    }
    let requested = spec.load_balancer_ip.as_deref();
    Claimant {
        role,
        families,
        requested: requested.and_then(|text| text.parse().ok()),
        held: ingress(service)
            .iter()
            .map(|ingress| ingress.ip.as_deref()?.parse().ok())
            .collect(),
        external_ips: spec
            .external_ips
            .iter()
            .flatten()
            .filter_map(|text| text.parse().ok())
            .collect(),
    }
}

fn ingress(service: &Service) -> &[LoadBalancerIngress] {
    let status = service.status.as_ref();
    let balancer = status.and_then(|status| status.load_balancer.as_ref());
    balancer
        .and_then(|balancer| balancer.ingress.as_deref())
        .unwrap_or_default()
}

/// The Service with these addresses in its status.
fn with_addresses(service: &Service, addresses: &[IpAddr]) -> Service {
    let mut service = service.clone();
    let ingress = addresses.iter().map(|address| LoadBalancerIngress {
        ip: Some(address.to_string()),
        // Traffic arrives with the address as its destination.
        ip_mode: Some("VIP".to_owned()),
        ..LoadBalancerIngress::default()
    });
    let status = service.status.get_or_insert_default();
    status.load_balancer = Some(LoadBalancerStatus {
        ingress: (!addresses.is_empty()).then(|| ingress.collect()),
    });
    service
}

struct LoadBalancers {
    context: Arc<Context>,
    /// Why each Service that waits does so, as its last event said.
    told: Mutex<HashMap<ObjectKey, String>>,
}

impl LoadBalancers {
    /// Says why a Service waits, once per reason.
    async fn tell(&self, services: &[Arc<Service>], pending: &[(usize, String)]) {
        let now: HashMap<ObjectKey, String> = pending
            .iter()
            .map(|(index, reason)| (ObjectKey::of(&services[*index].metadata), reason.clone()))
            .collect();
        let before = {
            let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::replace(&mut *told, now)
        };
        for (index, reason) in pending {
            let service = &services[*index];
            if before.get(&ObjectKey::of(&service.metadata)) == Some(reason) {
                continue;
            }
            let (type_, message) = (EventType::Warning, reason.clone());
            let event = super::event_about(&**service, Self::NAME, type_, "NoAddress", message);
            self.context.registry.event(event).await;
        }
    }
}

impl Controller for LoadBalancers {
    const NAME: &'static str = "load-balancer-controller";
    type Key = ObjectKey;

    async fn reconcile(&self, _: &ObjectKey) -> Result<Option<Duration>, Status> {
        let mut services = self.context.caches.services.all();
        services.sort_by_cached_key(|service| {
            let metadata = &service.metadata;
            let created = metadata.creation_timestamp.as_ref().map(|time| time.0);
            (created, metadata.uid.clone())
        });
        let claimants: Vec<Claimant> = services.iter().map(|service| claimant(service)).collect();
        let plan = plan(&self.context.settings.load_balancer_pool, &claimants);
        for (index, addresses) in &plan.writes {
            let service = &services[*index];
            // With the revision that was read: if anyone was faster, all is planned anew.
            let written = with_addresses(service, addresses);
            super::ignore_not_found(self.context.registry.update_status(&written).await)?;
            if addresses.is_empty() {
                continue;
            }
            let list: Vec<String> = addresses.iter().map(ToString::to_string).collect();
            let message = format!("Assigned {}", list.join(", "));
            let (type_, reason) = (EventType::Normal, "AddressAssigned");
            let event = super::event_about(&**service, Self::NAME, type_, reason, message);
            self.context.registry.event(event).await;
        }
        self.tell(&services, &plan.pending).await;
        Ok(None)
    }
}

/// Starts the worker.
pub(super) fn start(context: &Arc<Context>, tasks: &mut JoinSet<()>, shutdown: &CancellationToken) {
    let queue: WorkQueue<ObjectKey> = WorkQueue::new();
    let changed = queue.clone();
    context.caches.services.on_change(move |delta| {
        let concerns = |service: &Service| {
            let claimant = claimant(service);
            claimant.role != Role::Other
                || !claimant.held.is_empty()
                || !claimant.external_ips.is_empty()
        };
        let concerns_old = match delta {
            Delta::Applied { old, .. } => old.as_ref().is_some_and(|old| concerns(old)),
            Delta::Deleted(_) => false,
        };
        if concerns_old || concerns(delta.object()) {
            changed.add(ObjectKey::new("", "services"));
        }
    });
    let controller = LoadBalancers {
        context: Arc::clone(context),
        told: Mutex::new(HashMap::new()),
    };
    super::spawn_workers(controller, &queue, 1, context, tasks, shutdown);
}

#[cfg(test)]
mod tests;
