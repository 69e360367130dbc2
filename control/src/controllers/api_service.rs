//! The Service `kubernetes` in `default`: how pods reach the API.
//!
//! ```text
//!  service CIDR ─► its first address ─► Service (no selector) ─┐
//!  listen, advertise, this machine's addresses ┬► EndpointSlice ┴─► feed ─► connect(10.96.0.1:443)
//!  over etcd: those of all control planes ─────┘
//! ```
//! Looked at every [`INTERVAL`], as Kubernetes' apiserver does: a Service that somebody deleted is
//! back, and an address that this machine got later is in the slice. The address is never a loopback
//! one, which each pod would take for itself; while there is none, the slice is empty and a pod's
//! connect is refused at once. A control plane over etcd that has died is out with its lease, and the
//! agents leave it out before that. Those with another port or family than ours have slices of their own.
//!
//! Source: Kubernetes `pkg/controlplane/controller/kubernetesservice/controller.go`.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use gantry_api::k8s_openapi::api::core::v1::{Service, ServicePort, ServiceSpec};
use gantry_api::k8s_openapi::api::discovery::v1::{
    Endpoint, EndpointConditions, EndpointPort, EndpointSlice,
};
use gantry_api::k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use gantry_api::k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use gantry_api::status::{Reason, Status};
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use super::endpointslice::SERVICE_NAME;
use crate::server::registry::{DeleteOptions, Registry};
use crate::store::{Candidate, Replica};

/// The namespace of the Service.
const NAMESPACE: &str = "default";
/// Its name, and that of its slice with our port.
const NAME: &str = "kubernetes";
/// Its key in the store: whose the address is.
pub(crate) const API_SERVICE_KEY: &str = "/registry/services/default/kubernetes";
/// The port of the Service.
const PORT: i32 = 443;
/// Between two looks, as in Kubernetes.
const INTERVAL: Duration = Duration::from_secs(10);

/// Where the API is.
#[derive(Clone, Copy, Debug)]
pub struct ApiPlace {
    /// The cluster IP: the first of the service range.
    pub cluster_ip: Ipv4Addr,
    /// Where the server listens.
    pub listen: SocketAddr,
    /// What pods are told, if it was configured.
    pub advertise: Option<IpAddr>,
}

/// Keeps Service and slices until `stop`; over etcd, `others` knows all that serve.
pub async fn run(
    registry: Registry,
    place: ApiPlace,
    others: Option<Candidate>,
    stop: CancellationToken,
) {
    let mut ticks = tokio::time::interval(INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut told = None;
    let mut known = BTreeSet::new();
    loop {
        tokio::select! {
            // Both arms are cancel safe.
            () = stop.cancelled() => return,
            _ = ticks.tick() => {}
        }
        let address = advertised(place.listen.ip(), place.advertise, own_address());
        if told != Some(address) {
            told = Some(address);
            match address {
                Some(address) => {
                    tracing::info!(%address, "pods reach the API through kubernetes.default")
                }
                None => tracing::warn!(
                    listen = %place.listen,
                    "pods cannot reach the API: this machine has no address but loopback ones there; \
                     use --listen with an address of this machine, or --advertise-address"
                ),
            }
        }
        if let Some(others) = &others {
            match others.replicas().await {
                Ok(replicas) => known = reached(&replicas),
                // The last ones known stay.
                Err(error) => {
                    tracing::warn!(%error, "etcd does not say which control planes serve")
                }
            }
        }
        let mut all = known.clone();
        all.extend(address.map(|ip| SocketAddr::new(ip, place.listen.port())));
        if let Err(error) = ensure(&registry, place, &all).await {
            tracing::warn!(%error, "the Service kubernetes is not as it should be; trying again");
        }
    }
}

/// The URL at which other control planes reach this one: as pods do, or on loopback if it listens there only.
pub(crate) fn reached_at(listen: SocketAddr, configured: Option<IpAddr>) -> String {
    let address = advertised(listen.ip(), configured, own_address()).unwrap_or(listen.ip());
    format!("https://{}", SocketAddr::new(address, listen.port()))
}

/// Where pods reach these.
fn reached(replicas: &[Replica]) -> BTreeSet<SocketAddr> {
    let addresses = replicas.iter().filter_map(|replica| {
        let address = replica.url.strip_prefix("https://")?;
        address.parse::<SocketAddr>().ok()
    });
    addresses.filter(|it| !it.ip().is_loopback()).collect()
}

/// The address that pods are told: the configured one, else the one listened on, else this
/// machine's. None: only loopback.
fn advertised(listen: IpAddr, configured: Option<IpAddr>, own: Option<IpAddr>) -> Option<IpAddr> {
    if configured.is_some() {
        return configured;
    }
    if listen.is_unspecified() {
        return own;
    }
    (!listen.is_loopback()).then_some(listen)
}

/// The address from which this machine would talk to the world, else any that others can use.
fn own_address() -> Option<IpAddr> {
    // Connecting a UDP socket asks the routing table and sends nothing (192.0.2.0/24: RFC 5737).
    let routed = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).and_then(|socket| {
        socket.connect((Ipv4Addr::new(192, 0, 2, 1), 9))?;
        socket.local_addr()
    });
    if let Ok(address) = routed
        && !address.ip().is_loopback()
    {
        return Some(address.ip());
    }
    let interfaces = nix::ifaddrs::getifaddrs().ok()?;
    let mut usable = interfaces.filter_map(|interface| {
        let address = interface.address?.as_sockaddr_in()?.ip();
        (!address.is_loopback() && !address.is_link_local()).then_some(IpAddr::V4(address))
    });
    usable.next()
}

async fn ensure(
    registry: &Registry,
    place: ApiPlace,
    addresses: &BTreeSet<SocketAddr>,
) -> Result<(), Status> {
    if registry.get::<Service>(NAMESPACE, NAME)?.is_none() {
        ignore_exists(registry.create(&service(place)).await)?;
    }
    let wanted = slices(place, addresses);
    for (name, wanted) in &wanted {
        match registry.get::<EndpointSlice>(NAMESPACE, name)? {
            None => ignore_exists(registry.create(wanted).await)?,
            Some(found) => {
                let mut new = found.clone();
                new.endpoints.clone_from(&wanted.endpoints);
                new.ports.clone_from(&wanted.ports);
                let labels = new.metadata.labels.get_or_insert_default();
                labels.extend(wanted.metadata.labels.clone().unwrap_or_default());
                if new != found {
                    registry.update(&new).await?;
                }
            }
        }
    }
    for slice in registry.list::<EndpointSlice>(Some(NAMESPACE))?.1 {
        let name = slice.metadata.name.unwrap_or_default();
        if is_ours(&name) && !wanted.contains_key(&name) {
            let options = DeleteOptions::default();
            match registry
                .delete::<EndpointSlice>(NAMESPACE, &name, &options)
                .await
            {
                Err(status) if status.reason != Reason::NotFound => return Err(status),
                _ => {}
            }
        }
    }
    Ok(())
}

/// A slice of [`slices`]: nobody else may have these names.
fn is_ours(name: &str) -> bool {
    let rest = name
        .strip_prefix(NAME)
        .and_then(|rest| rest.strip_prefix('-'));
    let port = rest.map(|rest| rest.strip_suffix("-ipv6").unwrap_or(rest));
    port.is_some_and(|port| port.parse::<u16>().is_ok())
}

/// By name: one for each port and family, ours always.
fn slices(place: ApiPlace, addresses: &BTreeSet<SocketAddr>) -> BTreeMap<String, EndpointSlice> {
    let port = place.listen.port();
    let own = addresses.iter().find(|address| address.port() == port);
    let own = (own.is_some_and(SocketAddr::is_ipv6), port);
    let mut grouped = BTreeMap::from([(own, Vec::new())]);
    for address in addresses {
        let group = grouped.entry((address.is_ipv6(), address.port()));
        group.or_default().push(address.ip());
    }
    let named = grouped.into_iter().map(|((is_v6, port), addresses)| {
        let name = match (is_v6, port) {
            group if group == own => NAME.to_owned(),
            (true, port) => format!("{NAME}-{port}-ipv6"),
            (false, port) => format!("{NAME}-{port}"),
        };
        let slice = slice(&name, is_v6, &addresses, port);
        (name, slice)
    });
    named.collect()
}

fn ignore_exists<T>(result: Result<T, Status>) -> Result<(), Status> {
    match result {
        Err(status) if status.reason != Reason::AlreadyExists => Err(status),
        _ => Ok(()),
    }
}

fn service(place: ApiPlace) -> Service {
    let labels = [("component", "apiserver"), ("provider", "kubernetes")];
    Service {
        metadata: ObjectMeta {
            name: Some(NAME.to_owned()),
            namespace: Some(NAMESPACE.to_owned()),
            labels: Some(labels.map(|(k, v)| (k.to_owned(), v.to_owned())).into()),
            ..ObjectMeta::default()
        },
        spec: Some(ServiceSpec {
            cluster_ip: Some(place.cluster_ip.to_string()),
            ports: Some(vec![ServicePort {
                name: Some("https".to_owned()),
                port: PORT,
                protocol: Some("TCP".to_owned()),
                target_port: Some(IntOrString::Int(place.listen.port().into())),
                ..ServicePort::default()
            }]),
            ..ServiceSpec::default()
        }),
        ..Service::default()
    }
}

fn slice(name: &str, is_v6: bool, addresses: &[IpAddr], port: u16) -> EndpointSlice {
    let endpoint = |address: &IpAddr| Endpoint {
        addresses: vec![address.to_string()],
        conditions: Some(EndpointConditions {
            ready: Some(true),
            ..EndpointConditions::default()
        }),
        ..Endpoint::default()
    };
    let labels = BTreeMap::from([(SERVICE_NAME.to_owned(), NAME.to_owned())]);
    EndpointSlice {
        address_type: if is_v6 { "IPv6" } else { "IPv4" }.to_owned(),
        endpoints: Some(addresses.iter().map(endpoint).collect()),
        metadata: ObjectMeta {
            name: Some(name.to_owned()),
            namespace: Some(NAMESPACE.to_owned()),
            labels: Some(labels),
            ..ObjectMeta::default()
        },
        ports: Some(vec![EndpointPort {
            name: Some("https".to_owned()),
            port: Some(port.into()),
            protocol: Some("TCP".to_owned()),
            ..EndpointPort::default()
        }]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::registry::Settings;
    use crate::store::Store;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn pods_are_told_an_address_that_is_not_their_own() {
        let own = Some(ip("192.0.2.7"));
        for (listen, configured, own, wanted) in [
            ("0.0.0.0", None, own, own),
            ("::", None, own, own),
            ("10.0.0.5", None, own, Some(ip("10.0.0.5"))),
            ("127.0.0.1", None, own, None),
            ("127.0.0.1", Some(ip("10.0.0.9")), own, Some(ip("10.0.0.9"))),
            ("0.0.0.0", None, None, None),
        ] {
            assert_eq!(advertised(ip(listen), configured, own), wanted, "{listen}");
        }
    }

    #[test]
    fn a_control_plane_is_reached_where_it_says_but_not_on_loopback() {
        let replica = |url: &str| Replica {
            name: String::new(),
            url: url.to_owned(),
        };
        let urls = [
            "https://192.0.2.7:6443",
            "https://127.0.0.1:1",
            "",
            "https://[2001:db8::1]:6443",
        ];
        let found = reached(&urls.map(replica));
        let wanted = ["192.0.2.7:6443", "[2001:db8::1]:6443"];
        assert_eq!(found, wanted.map(|it| it.parse().unwrap()).into());
    }

    #[tokio::test]
    async fn the_service_and_its_address_are_kept_as_they_should_be() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("store")).unwrap();
        let cluster_ip = Ipv4Addr::new(10, 96, 0, 1);
        let settings = Settings {
            service_cidr: "10.96.0.0/16".parse().unwrap(),
            reserved_addresses: vec![(cluster_ip, API_SERVICE_KEY.to_owned())],
        };
        let registry = Registry::new(store, &settings);
        registry.ensure_defaults().await.unwrap();
        let place = ApiPlace {
            cluster_ip,
            listen: "0.0.0.0:6443".parse().unwrap(),
            advertise: None,
        };
        let addresses = |registry: &Registry| {
            let slice: EndpointSlice = registry.get(NAMESPACE, NAME).unwrap().unwrap();
            let endpoints = slice.endpoints.unwrap_or_default();
            let all = endpoints.into_iter().flat_map(|e| e.addresses);
            all.collect::<Vec<String>>()
        };
        let set = |all: &[&str]| all.iter().map(|it| it.parse().unwrap()).collect();
        ensure(&registry, place, &set(&[])).await.unwrap();
        assert!(addresses(&registry).is_empty());
        ensure(&registry, place, &set(&["192.0.2.7:6443"]))
            .await
            .unwrap();
        assert_eq!(addresses(&registry), ["192.0.2.7"]);

        // No other Service gets its address, neither before nor after it was deleted.
        let options = DeleteOptions::default();
        registry
            .delete::<Service>(NAMESPACE, NAME, &options)
            .await
            .unwrap();
        let mut other = service(place);
        other.metadata.name = Some("other".to_owned());
        assert!(registry.create(&other).await.is_err());
        ensure(&registry, place, &set(&["192.0.2.8:6443"]))
            .await
            .unwrap();
        let service: Service = registry.get(NAMESPACE, NAME).unwrap().unwrap();
        assert_eq!(
            service.spec.unwrap().cluster_ip.as_deref(),
            Some("10.96.0.1")
        );
        assert_eq!(addresses(&registry), ["192.0.2.8"]);
        let revision = registry.store().revision();
        ensure(&registry, place, &set(&["192.0.2.8:6443"]))
            .await
            .unwrap();
        assert_eq!(registry.store().revision(), revision, "nothing to write");

        // All control planes; those elsewhere have slices of their own, and these go with them.
        let names = |registry: &Registry| {
            let slices = registry.list::<EndpointSlice>(Some(NAMESPACE)).unwrap().1;
            let names = slices.into_iter().map(|slice| slice.metadata.name.unwrap());
            names.collect::<Vec<String>>()
        };
        let all = set(&[
            "192.0.2.8:6443",
            "192.0.2.9:6443",
            "192.0.2.9:7443",
            "[2001:db8::1]:6443",
        ]);
        ensure(&registry, place, &all).await.unwrap();
        assert_eq!(addresses(&registry), ["192.0.2.8", "192.0.2.9"]);
        let three = ["kubernetes", "kubernetes-6443-ipv6", "kubernetes-7443"];
        assert_eq!(names(&registry), three);
        ensure(&registry, place, &set(&["192.0.2.8:6443"]))
            .await
            .unwrap();
        assert_eq!(names(&registry), ["kubernetes"]);
        assert_eq!(addresses(&registry), ["192.0.2.8"]);
        registry.store().close().await;
    }
}
