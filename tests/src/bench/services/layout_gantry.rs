//! The Services as Gantry's agent is told of them: a view, as the feed publishes it. Pure.

use std::net::Ipv4Addr;
use std::sync::Arc;

use anyhow::Result;
use gantry_agent::ids::PodUid;
use gantry_agent::view::{Backends, ServiceName, View};
use gantry_api::k8s_openapi::api::core::v1::Pod;
use gantry_api::proto;

use super::model::{Model, SERVICE_PORT, Service, TARGET_PORT};

/// The node's name.
pub(super) const NODE: &str = "bench";
const TCP: u32 = 6;

/// A node with these pods and addresses, and no Service yet.
pub(super) fn node(pods: &[PodUid], address: Ipv4Addr) -> View {
    let mut view = View {
        rev: 1,
        ..View::default()
    };
    let route = proto::NodeRoute {
        pod_cidr: super::model::POD_PREFIX.into(),
        addresses: vec![bytes(address)],
        ..proto::NodeRoute::default()
    };
    Arc::make_mut(&mut view.nodes).insert(NODE.into(), Arc::new(route));
    for uid in pods {
        Arc::make_mut(&mut view.pods).insert(uid.clone(), Arc::new(pod(uid)));
    }
    view
}

/// The next view: all Services of the model.
pub(super) fn loaded(view: &View, model: &Model) -> Result<View> {
    let mut next = view.clone();
    for service in &model.services {
        put(&mut next, service)?;
    }
    next.rev += 1;
    Ok(next)
}

/// The next view: one Service takes the place of that of its name.
pub(super) fn changed(view: &View, service: &Service) -> Result<View> {
    let mut next = view.clone();
    put(&mut next, service)?;
    next.rev += 1;
    Ok(next)
}

/// The next view: with a Service whose only backend has its own address and port.
pub(super) fn looped(view: &View, address: Ipv4Addr) -> View {
    let mut next = view.clone();
    let name = ServiceName {
        namespace: "bench".into(),
        name: "loop".into(),
    };
    let object = proto::Service {
        uid: name.name.clone(),
        cluster_ips: vec![bytes(address)],
        ports: vec![proto::ServicePort {
            name: "http".into(),
            protocol: TCP,
            port: u32::from(TARGET_PORT),
            node_port: 0,
        }],
        r#type: "ClusterIP".into(),
        ..proto::Service::default()
    };
    let own = (address.to_string(), Arc::new(backend(address, "http")));
    let backends: Backends = std::iter::once(own).collect();
    Arc::make_mut(&mut next.services).insert(name.clone(), Arc::new(object));
    Arc::make_mut(&mut next.backends).insert(name, Arc::new(backends));
    next.rev += 1;
    next
}

fn put(view: &mut View, service: &Service) -> Result<()> {
    let (name, port) = names(service)?;
    let object = proto::Service {
        uid: name.name.clone(),
        cluster_ips: vec![bytes(service.address)],
        ports: vec![proto::ServicePort {
            name: port.into(),
            protocol: TCP,
            port: u32::from(SERVICE_PORT),
            node_port: service.node_port.map_or(0, u32::from),
        }],
        r#type: match service.node_port {
            Some(_) => "NodePort".into(),
            None => "ClusterIP".into(),
        },
        ..proto::Service::default()
    };
    let backends: Backends = service
        .endpoints
        .iter()
        .map(|endpoint| (endpoint.to_string(), Arc::new(backend(*endpoint, port))))
        .collect();
    Arc::make_mut(&mut view.services).insert(name.clone(), Arc::new(object));
    Arc::make_mut(&mut view.backends).insert(name, Arc::new(backends));
    Ok(())
}

fn backend(endpoint: Ipv4Addr, port: &str) -> proto::Backend {
    proto::Backend {
        addresses: vec![bytes(endpoint)],
        ports: vec![proto::BackendPort {
            name: port.into(),
            protocol: TCP,
            port: u32::from(TARGET_PORT),
        }],
        node: NODE.into(),
        pod_uid: format!("pod-{endpoint}"),
        ..proto::Backend::default()
    }
}

/// `bench/svc-7:http` taken apart.
fn names(service: &Service) -> Result<(ServiceName, &str)> {
    let parts = service.name.split_once('/');
    let parts = parts.and_then(|(namespace, rest)| Some((namespace, rest.split_once(':')?)));
    let (namespace, (name, port)) =
        parts.ok_or_else(|| anyhow::anyhow!("no namespace/name:port: {}", service.name))?;
    let name = ServiceName {
        namespace: namespace.into(),
        name: name.into(),
    };
    Ok((name, port))
}

fn pod(uid: &PodUid) -> Pod {
    let mut pod = Pod::default();
    pod.metadata.namespace = Some("bench".into());
    pod.metadata.name = Some(uid.as_str().into());
    pod.metadata.uid = Some(uid.as_str().into());
    pod
}

fn bytes<B: From<Vec<u8>>>(address: Ipv4Addr) -> B {
    address.octets().to_vec().into()
}

#[cfg(test)]
mod tests {
    use super::super::model::{NODE_PORT, Size};
    use super::*;

    #[test]
    fn a_view_has_the_models_services_and_the_next_one_only_the_change() {
        let model = Model::new(Size::of(10));
        let first = loaded(&node(&[], Ipv4Addr::LOCALHOST), &model).unwrap();
        assert_eq!((first.services.len(), first.backends.len()), (10, 10));
        let (name, port) = names(model.measured()).unwrap();
        assert_eq!((name.name.as_str(), port), ("svc-5", "http"));
        let service = &first.services[&name];
        assert_eq!(service.ports[0].node_port, u32::from(NODE_PORT));
        let second = changed(&first, &model.moved()).unwrap();
        assert_eq!(second.rev, first.rev + 1);
        for (name, backends) in second.backends.iter() {
            let same = Arc::ptr_eq(backends, &first.backends[name]);
            assert_eq!(same, name.name != "svc-5", "{}", name.name);
        }
        let addresses: Vec<&str> = second.backends[&name].keys().map(String::as_str).collect();
        assert_eq!(addresses, ["10.244.8.4", "10.244.8.5", "10.244.8.6"]);
    }
}
