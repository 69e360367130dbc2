//! What a control plane says of a request that it brings to the leader, and what the leader believes.
//!
//! Whoever connects may send these headers; they are read of a connection with a certificate of
//! [`super::identity::CONTROL_GROUP`] alone, and a control plane removes what its own client sent of them.

use std::net::{IpAddr, SocketAddr};

use http::Request;
use tokio_rustls::rustls::pki_types::CertificateDer;
use tonic::metadata::{MetadataMap, MetadataValue};
use tonic::service::AxumBody;
use tonic::transport::server::{TcpConnectInfo, TlsConnectInfo};

use super::identity::Identity;

/// Says that a request was brought by another control plane.
pub(super) const MARK: &str = "gantry-forwarded";
/// The client's certificate in DER, if it has one.
pub(super) const CERTIFICATE: &str = "gantry-client-certificate-bin";
/// Where the client is.
const ADDRESS: &str = "gantry-client-address";

/// With who asks, for the leader.
pub(super) fn mark(mut request: Request<AxumBody>) -> Result<Request<AxumBody>, tonic::Status> {
    for name in [MARK, CERTIFICATE, ADDRESS] {
        request.headers_mut().remove(name);
    }
    let mut headers = MetadataMap::new();
    headers.insert(MARK, MetadataValue::from_static("1"));
    let connection = request
        .extensions()
        .get::<TlsConnectInfo<TcpConnectInfo>>()
        .ok_or_else(|| tonic::Status::internal("a request without a connection"))?;
    if let Some(leaf) = connection.peer_certs().as_deref().and_then(|c| c.first()) {
        headers.insert_bin(CERTIFICATE, MetadataValue::from_bytes(leaf));
    }
    let address = connection.get_ref().remote_addr();
    if let Some(Ok(text)) = address.map(|address| address.to_string().parse()) {
        headers.insert(ADDRESS, text);
    }
    request.headers_mut().extend(headers.into_headers());
    Ok(request)
}

/// The certificate that another control plane has verified, on a connection of its own.
pub(super) fn certificate(
    request: &tonic::Request<()>,
) -> Result<Option<Vec<u8>>, gantry_api::status::Status> {
    let Some(value) = request.metadata().get_bin(CERTIFICATE) else {
        return Ok(None);
    };
    let der = value.to_bytes().map_err(|_| {
        gantry_api::status::Status::unauthorized("the forwarded certificate cannot be read")
    })?;
    Ok(Some(der.to_vec()))
}

fn is_of_control_plane(leaf: &CertificateDer<'_>) -> bool {
    let identity = Identity::from_certificate(leaf);
    identity.is_ok_and(|identity| identity.is_control_plane())
}

/// Where who asks is.
pub(crate) fn address<T>(request: &tonic::Request<T>) -> Option<IpAddr> {
    let own = request.remote_addr().map(|address| address.ip());
    let certificates = request.peer_certs();
    let leaf = certificates.as_deref().and_then(|chain| chain.first());
    if !leaf.is_some_and(is_of_control_plane) {
        return own;
    }
    let said = request.metadata().get(ADDRESS)?.to_str().ok()?;
    said.parse::<SocketAddr>().ok().map(|address| address.ip())
}
