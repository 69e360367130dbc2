use super::*;

#[test]
fn named_ports_are_looked_up() {
    let config: Container = serde_json::from_value(serde_json::json!({
        "name": "a", "ports": [{"name": "web", "containerPort": 8080}]
    }))
    .unwrap();
    assert_eq!(
        port_number(&config, &IntOrString::String("web".into())),
        Ok(8080)
    );
    assert!(port_number(&config, &IntOrString::String("nope".into())).is_err());
    assert!(port_number(&config, &IntOrString::Int(0)).is_err());
    assert!(port_number(&config, &IntOrString::Int(70_000)).is_err());
}

fn target() -> Target {
    let paths = crate::paths::Paths::standard("/nowhere".into());
    Target {
        run: ContainerRun {
            pod: crate::ids::PodUid::new("u1").unwrap(),
            name: "a".into(),
            attempt: 0,
        },
        config: Container::default(),
        address: IpAddr::from([127, 0, 0, 1]),
        runtime: Arc::new(crate::runtime::shim::ShimRuntime::new(paths)),
    }
}

/// `grpc.health.v1.Health` as a container would serve it; its answer depends on the service's name.
#[derive(Clone)]
struct Health;

impl tonic::server::NamedService for Health {
    const NAME: &'static str = "grpc.health.v1.Health";
}

impl tonic::codegen::Service<http::Request<tonic::body::Body>> for Health {
    type Response = http::Response<tonic::body::Body>;
    type Error = std::convert::Infallible;
    type Future =
        std::pin::Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(
        &mut self,
        _: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Result<(), Self::Error>> {
        std::task::Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<tonic::body::Body>) -> Self::Future {
        struct Check;
        impl tonic::server::UnaryService<health::CheckRequest> for Check {
            type Response = health::CheckResponse;
            type Future =
                std::future::Ready<Result<tonic::Response<health::CheckResponse>, tonic::Status>>;
            fn call(&mut self, request: tonic::Request<health::CheckRequest>) -> Self::Future {
                let answer = match request.into_inner().service.as_str() {
                    "" => Ok(1),
                    "down" => Ok(2),
                    other => Err(tonic::Status::not_found(other.to_owned())),
                };
                std::future::ready(
                    answer.map(|status| tonic::Response::new(health::CheckResponse { status })),
                )
            }
        }
        Box::pin(async move {
            assert_eq!(request.uri().path(), "/grpc.health.v1.Health/Check");
            let codec =
                tonic_prost::ProstCodec::<health::CheckResponse, health::CheckRequest>::default();
            Ok(tonic::server::Grpc::new(codec).unary(Check, request).await)
        })
    }
}

#[tokio::test]
async fn grpc_health_is_asked_by_service() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = i32::from(listener.local_addr().unwrap().port());
    let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
    let server = tonic::transport::Server::builder().add_service(Health);
    let serving = tokio::spawn(server.serve_with_incoming(incoming));
    let ask = |service: &str| {
        let action = GRPCAction {
            port,
            service: Some(service.to_owned()),
        };
        async move { target().grpc(&action).await }
    };
    assert_eq!(ask("").await, Ok(()));
    assert_eq!(
        ask("down").await,
        Err("service unhealthy (responded with NOT_SERVING)".into())
    );
    assert!(ask("who").await.unwrap_err().contains("who"));
    serving.abort();
    let _ = serving.await;
    let refused = ask("").await.unwrap_err();
    assert!(refused.contains("dial tcp 127.0.0.1"), "{refused}");
}
