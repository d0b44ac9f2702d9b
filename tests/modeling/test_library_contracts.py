"""The common test suites of transformers 5.23 and diffusers 0.42, check by check.

They are written for classes inside of those libraries, so what applies is asked of our classes by tests of our own.
Each table maps names of upstream checks, without their `test_`, to these tests (`file.test`) or to the reason why there
is none. The source distribution of transformers holds the suites of models, processors and image processors; they run
on our classes unchanged, except for the checks whose entry says "Refused".
"""

import re
from pathlib import Path

import pytest


MODELS = {
    # Weights
    "save_load load_contiguous_weights can_use_safetensors from_pretrained_no_checkpoint": """
        test_model_contracts.test_a_model_outlives_saving_and_loading
        test_modeling.test_saved_and_loaded_model_gives_equal_logits""",
    "can_init_all_missing_weights init_weights_can_init_buffers": """
        test_model_contracts.test_the_initialisation_gives_every_weight_and_buffer_its_value""",
    "all_tensors_are_parameter_or_buffer": """
        test_model_contracts.test_a_model_holds_no_tensors_beside_weights_and_buffers""",
    "keep_in_fp32_modules_exist keep_in_fp32_modules bc_torch_dtype": """
        test_model_contracts.test_a_model_loads_in_half_precision_and_keeps_what_decides_codes""",
    "base_model_prefix_loads_base_weights model_base_model_prefix correct_missing_keys": """
        test_model_contracts.test_a_whole_model_loads_as_its_backbone_and_a_backbone_not_as_a_whole_model
        Refused: a checkpoint that lacks tensors is an error here, not a model with random parts.""",
    "model_weights_reload_no_missing_tied_weights": """
        test_modeling.test_checkpoint_with_a_missing_tensor_is_refused
        Refused: the check loads a file without weights.""",
    "load_save_without_tied_weights tied_weights_keys": """
        test_modeling.test_saved_and_loaded_model_gives_equal_logits""",
    "load_with_mismatched_shapes can_load_ignoring_mismatched_shapes": """
        test_modeling.test_checkpoint_with_a_misshapen_tensor_is_refused
        test_model_contracts.test_tensors_of_another_size_are_drawn_anew_where_this_is_asked_for""",
    "can_be_initialized_on_meta": "test_model_contracts.test_a_model_builds_on_the_meta_device",
    "cpu_offload disk_offload_bin disk_offload_safetensors": """
        test_model_contracts.test_a_model_loads_with_a_device_map
        test_model_contracts.test_a_model_with_its_vision_tokenizer_on_disk_reads_images""",
    "model_parallelism can_load_with_device_context_manager can_load_with_global_device_set": "Needs accelerators.",
    "cannot_load_with_meta_device_context_manager torch_save_load": "Nothing of ours takes part.",
    "save_load_keys_to_ignore_on_save reverse_loading_mapping can_load_from_already_mapped_keys": """
        No key is left out or renamed on the way.""",
    # A pass
    "determinism": "test_model_contracts.test_two_passes_give_the_same_also_in_train_mode",
    "batching_equivalence": """
        test_modeling.test_rows_of_a_batch_do_not_touch_each_other
        test_modeling_vq.test_a_batch_gives_the_codes_of_single_images
        test_tokenflow_t2i.test_one_pass_equals_the_reference_wherever_the_prompt_begins""",
    "model_outputs_equivalence": "test_model_contracts.test_a_tuple_holds_what_the_output_holds",
    "hidden_states_output attention_outputs retain_grad_hidden_states_attentions format_of_can_record_outputs": """
        test_model_contracts.test_hidden_states_and_attentions_are_given_where_they_are_asked_for""",
    "capture_outputs_decorator can_capture_specific_layers_hidden_states": """
        The vision tokenizer gives no hidden states; the backbones' are captured by transformers itself.""",
    "inputs_embeds inputs_embeds_matches_input_ids": """
        test_model_contracts.test_embeddings_of_a_text_give_what_its_tokens_give""",
    "model_main_input_name": "test_model_contracts.test_the_main_input_comes_first",
    "model_forward_default_config_values": "test_modeling.test_preset_of_the_paper_builds_on_the_meta_device",
    "model_rope_scaling_from_config model_rope_scaling_frequencies model_rope_with_partial_rotation": """
        test_modeling.test_text_only_logits_equal_those_of_qwen2_5_vl
        Rotary embeddings are transformers' own.""",
    # Attention
    "eager_matches_sdpa_inference": """
        test_modeling.test_all_attention_implementations_agree
        test_model_contracts.test_every_attention_implementation_gives_the_same
        Refused: the check cuts batches within their images, and pads TokenFlow-t2i's prompts on the right.""",
    "can_set_attention_dynamically config_attn_implementation_setter internal_model_config_and_subconfig_are_same": """
        test_model_contracts.test_an_attention_implementation_is_set_on_every_part""",
    "can_set_attention_dynamically_composite_model": """
        test_model_contracts.test_the_attention_of_the_text_part_can_be_another""",
    """sdpa_can_dispatch_composite_models sdpa_can_dispatch_non_composite_models
    attn_implementation_composite_models""": """
        test_model_contracts.test_an_attention_implementation_is_set_on_every_part
        Refused: the tokenizer's semantic decoder, which only training runs, has sdpa whatever is asked for.""",
    """flash_attn_2_inference_equivalence flash_attn_2_inference_equivalence_right_padding
    flash_attn_3_inference_equivalence flash_attn_3_inference_equivalence_right_padding
    flash_attn_4_inference_equivalence flash_attn_4_inference_equivalence_right_padding flash_attn_2_from_config
    flash_attn_3_from_config flash_attn_4_from_config flash_attn_2_can_dispatch_composite_models
    flash_attn_3_can_dispatch_composite_models flash_attn_4_can_dispatch_composite_models flash_attn_2_fp32_ln
    flash_attn_2_can_compile_with_attention_mask_None_without_graph_break flash_attn_kernels_inference_equivalence
    flash_attn_kernels_mps_inference_equivalence sdpa_can_dispatch_on_flash""": """
        test_model_contracts.test_flash_attention_which_drops_the_masks_of_images_is_refused""",
    "torch_compile_for_training sdpa_can_compile_dynamic": """
        test_model_contracts.test_a_pass_over_text_compiles_as_one_graph""",
    "flex_attention_with_grads": "test_packing.test_packed_samples_have_the_logits_and_losses_of_padded_ones",
    "sliding_window_mask": "No layer has a window.",
    # Training
    "training": """
        test_model_contracts.test_gradient_checkpointing_of_either_kind_changes_no_gradient
        Refused: backbone, tokenizer and TokenFlow-t2i have no `labels`.""",
    """training_gradient_checkpointing training_gradient_checkpointing_use_reentrant_false
    training_gradient_checkpointing_use_reentrant_true""": """
        test_model_contracts.test_gradient_checkpointing_of_either_kind_changes_no_gradient""",
    "gradient_checkpointing_enable_disable": "test_model_contracts.test_gradient_checkpointing_can_be_switched_off",
    """enable_input_require_grads enable_input_require_grads_with_gradient_checkpointing
    peft_gradient_checkpointing_enable_disable""": """
        test_model_contracts.test_embeddings_can_be_made_to_ask_for_gradients""",
    "gradient_checkpointing_backward_compatibility": "An argument of configs before transformers 5.",
    "training_overfit": "test_trainer.test_it_learns_two_samples_by_heart_and_leaves_the_tokenizer_alone",
    "causal_lm_loss_honors_shift_labels encoder_decoder_loss_no_double_shift problem_types": """
        test_loss.test_loss_equals_the_reference
        The loss is our own: codes are not shifted.""",
    # Embeddings and plans
    "model_get_set_embeddings": "test_model_contracts.test_embeddings_can_be_taken_and_replaced",
    "resize_tokens_embeddings resize_embeddings_untied resize_embeddings_untied_no_reinit_on_post_init": """
        test_modeling.test_text_embeddings_can_be_resized
        test_model_contracts.test_a_larger_vocabulary_leaves_the_codes_of_tokenflow_t2i_where_they_are
        Refused: the check sets `config.vocab_size`, which is the sum of text and codes here.""",
    "resize_position_vector_embeddings": "Positions are rotary.",
    """resize_tokens_embeddings_with_deepspeed resize_tokens_embeddings_with_deepspeed_multi_gpu
    resize_embeddings_untied_with_deepspeed resize_embeddings_untied_with_deepspeed_multi_gpu""": "Needs DeepSpeed.",
    "tp_plan_matches_params tied_head_has_a_tp_plan_entry fsdp_plan_declared tp_plan_shards_input_embeddings": """
        test_modeling.test_parallel_plans_name_modules_that_exist
        test_model_contracts.test_the_plans_of_tensor_parallelism_name_modules_that_exist""",
    """fsdp2_sharding_structure fsdp2_save_load fsdp2_bf16_training fsdp2_save_load_dcp hsdp_save_load
    hsdp_save_load_dcp hsdp_grad_accumulation_vs_single_device fsdp2_plan_vs_ddp""": """
        test_loss.test_sharded_heads_give_the_same_loss_and_gradients
        The rest needs accelerators.""",
    "tp_forward tp_backward tp_generation tp_generation_quantized": "Needs several accelerators.",
    # What there is none of
    """get_image_features_output get_image_features_pooler_output get_image_features_hidden_states
    get_image_features_attentions""": """
        test_modeling.test_pixels_are_encoded_like_the_codes_that_they_give
        Images become codes, not features.""",
    """get_text_features_output get_text_features_hidden_states get_text_features_attentions get_audio_features_output
    get_audio_features_hidden_states get_audio_features_attentions get_video_features_output
    get_video_features_pooler_output get_video_features_hidden_states get_video_features_attentions
    vision_axial_rope""": "There is no such tower.",
    """eager_matches_batched_and_grouped_inference moe_models_record_router_logits output_router_logits_from_config
    moe_parallel_plans_shard_experts fsdp2_expert_parallel_2d_vs_ddp fsdp2_expert_parallel_bf16_grads""": """
        There are no experts.""",
    "feed_forward_chunking kernels_can_load_without_crashing": "There is no such option.",
    "num_layers_is_small model_is_small generation_tester_mixin_inheritance": "About the tests of transformers itself.",
    "head pruning": "Gone from transformers 5.",
}

GENERATION = {
    "greedy_generate greedy_generate_dict_outputs greedy_generate_dict_outputs_use_cache past_key_values_format": """
        test_generation_contracts.test_all_that_is_asked_for_comes_with_its_shape
        test_generation.test_text_after_images_equals_greedy_by_full_passes""",
    "sample_generate sample_generate_dict_output": """
        test_generation_contracts.test_a_seed_gives_its_sample_and_another_another
        test_generation.test_text_never_holds_codes_or_the_tokens_around_images""",
    "beam_search_generate beam_search_generate_dict_output beam_search_generate_dict_outputs_use_cache": """
        test_generation.test_beams_and_several_answers_keep_each_rows_own_images""",
    "beam_sample_generate beam_sample_generate_dict_output": """
        test_generation_contracts.test_beams_can_be_sampled_and_keep_their_prompts""",
    "generate_without_input_ids": """
        test_generation_contracts.test_text_can_begin_from_nothing_but_a_first_token""",
    "left_padding_compatibility": "test_generation_contracts.test_padding_on_the_left_changes_no_row",
    "generate_with_and_without_position_ids generate_methods_with_logits_to_keep": """
        test_generation_contracts.test_positions_that_are_given_are_those_that_would_be_found""",
    "generate_continue_from_past_key_values": """
        test_generation.test_text_goes_on_from_the_cache_of_an_earlier_answer""",
    """generate_from_inputs_embeds generate_from_random_inputs_embeds generate_from_inputs_embeds_with_static_cache
    generate_continue_from_inputs_embeds""": """
        test_generation_contracts.test_embeddings_as_a_prompt_are_read_or_refused_by_name""",
    "generate_with_static_cache generate_with_quant_cache offloaded_cache_implementation": """
        test_generation_contracts.test_text_is_the_same_on_every_cache
        test_generation_contracts.test_text_after_images_on_a_static_cache_is_the_same_or_refused
        Quantised and offloaded caches need packages and accelerators.""",
    """assisted_decoding_matches_greedy_search assisted_decoding_sample prompt_lookup_decoding_matches_greedy_search
    prompt_lookup_decoding_stops_at_eos""": """
        test_generation_contracts.test_what_a_prompt_repeats_can_be_guessed_ahead""",
    "eager_matches_sdpa_generate": "test_generation.test_text_after_images_equals_greedy_by_full_passes",
    "generate_compile_model_forward_fullgraph generate_compilation_all_outputs": """
        test_model_contracts.test_a_pass_over_text_compiles_as_one_graph""",
    "lengths, ends, criteria, streamers": """
        test_generation_contracts.test_lengths_are_kept
        test_generation_contracts.test_a_row_that_has_ended_is_padded_and_the_others_go_on
        test_generation_contracts.test_a_criterion_and_a_streamer_are_heard
        test_generation_contracts.test_settings_of_a_config_object_are_those_of_arguments""",
    "inherits_generation_mixin": "test_interleaved.test_limits_force_text_or_images",
    "eager_matches_fa2_generate eager_matches_fa3_generate flash_attention_2_continue_generate_with_position_ids": """
        test_model_contracts.test_flash_attention_which_drops_the_masks_of_images_is_refused""",
    "model_parallel_beam_search": "Needs several accelerators.",
    "TokenFlow-t2i": "It writes no text, and has no `generate`.",
}

PROCESSORS = {
    "processor_to_json_string processor_from_and_save_pretrained processor_from_and_save_pretrained_as_nested_dict": """
        test_processor_contracts.test_it_outlives_its_file_and_its_copy
        test_processing.test_it_is_saved_and_loaded""",
    "save_load_pretrained_additional_features processor_from_pretrained_vs_from_components args_overlap_kwargs": """
        test_processor_contracts.test_settings_of_loading_win_over_those_that_were_saved""",
    "subprocessor_defaults": "test_processor_contracts.test_each_part_gives_by_itself_what_it_gives_within",
    "tokenizer_decode_defaults": "test_processor_contracts.test_it_decodes_as_its_tokenizer_does",
    "model_input_names processor_with_multiple_inputs processor_text_has_no_visual": """
        test_processor_contracts.test_it_gives_what_its_model_takes_and_no_more
        test_processor_contracts.test_texts_of_a_call_are_left_as_they_were""",
    "if_input_has_mismatching_tokens_and_mm_data replacement_offsets": """
        test_processing.test_placeholders_and_images_must_agree_in_number
        test_processing.test_placeholders_without_images_are_refused
        test_processing.test_each_text_needs_as_many_images_as_it_has_placeholders
        test_processing.test_a_placeholder_becomes_the_slots_of_its_image""",
    "subprocessor_defaults_preserved_by_kwargs": """
        test_processor_contracts.test_settings_of_the_parts_hold_where_a_call_says_nothing""",
    """kwargs_overrides_default_subprocessor_kwargs unstructured_kwargs unstructured_kwargs_batched
    structured_kwargs_nested_from_dict overlapping_text_image_kwargs_handling""": """
        test_processor_contracts.test_settings_of_a_call_win_flat_and_by_part
        test_processing.test_arguments_of_a_call_win_over_the_processors_own""",
    "doubly_passed_kwargs flat_kwarg_applied_when_modality_dict_lacks_it": """
        test_processor_contracts.test_a_setting_given_twice_is_refused_and_one_given_flat_is_not_lost""",
    "chat_template_save_loading chat_template_jinja_kwargs": """
        test_processor_contracts.test_a_chat_template_of_its_own_is_kept_in_a_file_and_takes_arguments""",
    "apply_chat_template_image": """
        test_processor_contracts.test_a_chat_with_images_is_the_call_on_its_text_and_images
        test_processing.test_the_chat_format_is_qwens_without_a_system_message""",
    "apply_chat_template_assistant_mask": """
        test_processing.test_answers_are_marked_behind_several_images_and_in_padded_rows""",
    """apply_chat_template_video apply_chat_template_decoded_video
    apply_chat_template_video_frame_sampling""": """
        test_abilities.test_a_video_in_a_conversation_is_read_as_its_frames
        A video is read as images; there is no video processor.""",
    """init_arguments_not_in_class_attributes init_arguments_not_in_processor_kwargs
    call_arguments_not_in_processor_kwargs call_arguments_not_in_attributes call_arguments_default_none
    valid_processor_kwargs_set no_redundant_default_kwargs""": """
        test_processor_contracts.test_the_arguments_of_a_call_are_optional_and_its_parts_are_named_in_its_init""",
    "apply_chat_template_tool_calls_no_content": "The chat format has no tools.",
    """get_num_multimodal_tokens_matches_processor_call get_num_multimodal_tokens_matches_processor_call_video
    get_num_multimodal_tokens_matches_processor_call_audio""": """
        An optional method that servers ask for; `image_placeholder_ids` says the same of a grid.""",
    "chat_template_saving_rejects_path_traversal": "Nothing of ours takes part.",
    "apply_chat_template_audio chat_template_audio_sampling_rate chat_template_audio_from_video": "There is no sound.",
}

IMAGE_PROCESSORS = {
    """image_processor_has_attributes image_processor_from_dict_has_attributes
    image_processor_from_dict_with_kwargs_has_attributes image_processor_to_json_string image_processor_to_json_file
    image_processor_from_and_save_pretrained fast_image_processor_explicit_none_preserved""": """
        test_processor_contracts.test_an_image_processor_outlives_dicts_json_and_files
        test_image_processing.test_it_is_saved_and_loaded""",
    "image_processor_save_load_with_autoimageprocessor": "test_image_processing.test_it_is_saved_and_loaded",
    "init_without_params": "test_processor_contracts.test_an_image_processor_without_arguments_is_the_papers",
    "cast_dtype_device": "test_processor_contracts.test_the_values_can_be_cast_and_the_grids_stay_whole_numbers",
    "call_pil call_numpy call_pytorch": """
        test_image_processing.test_every_kind_of_input_gives_the_same_values
        test_processor_contracts.test_a_batch_holds_what_its_images_give_alone""",
    "call_numpy_4_channels": """
        test_image_processing.test_transparent_pixels_are_put_on_white
        Refused: the check asks for four channels out; the model reads three.""",
    "convert_to_rgb_mixed_input_batch": "test_processor_contracts.test_images_of_several_modes_make_one_batch",
    "image_processor_preprocess_arguments valid_kwargs_set": """
        test_processor_contracts.test_arguments_that_are_not_known_are_refused
        test_image_processing.test_arguments_of_a_call_win_over_the_processors_own""",
    "override_instance_attributes_does_not_affect_other_instances": """
        test_processor_contracts.test_what_one_image_processor_is_told_another_does_not_hear""",
    "pil_can_run_without_torchvision": "Every test here runs without torchvision.",
    """backends_equivalence backends_equivalence_batched save_load_backends save_load_backends_auto
    can_compile_torchvision_backend new_models_require_torchvision_backend""": """
        Refused: there is one backend, which needs no torchvision.""",
    """post_process_test_mixin_inheritance post_process_semantic_segmentation
    post_process_semantic_segmentation_target_sizes processor_can_use_legacy_annotation_format""": """
        Images have no annotations.""",
}

PIPELINES = {
    "save_load_local save_load_float16 save_load_dduf": """
        test_pipeline.test_a_saved_pipeline_draws_the_same_image
        test_pipeline.test_bfloat16_draws_and_keeps_the_codebooks_in_float32""",
    "save_load_optional_components components_function": """
        test_pipeline_contracts.test_its_components_make_another_pipeline_that_draws_the_same
        test_pipeline.test_components_that_are_given_are_not_loaded
        test_diffusion_decoding.test_a_saved_pipeline_brings_its_diffusion_decoder""",
    "from_pipe_consistent_config from_pipe_consistent_forward_pass": """
        test_pipeline_contracts.test_its_components_make_another_pipeline_that_draws_the_same""",
    "pipeline_call_signature": """
        test_pipeline_contracts.test_it_takes_the_arguments_by_which_pipelines_are_called
        The scales are the schedule's, so there is no `num_inference_steps`, and there are no `latents`.""",
    "inference_batch_consistent inference_batch_single_identical": """
        test_pipeline_contracts.test_a_batch_of_any_size_holds_what_its_generators_say
        test_pipeline.test_a_image_depends_on_its_own_generator_and_not_on_its_batch""",
    "num_images_per_prompt": "test_pipeline.test_the_images_of_a_prompt_follow_each_other",
    "dict_tuple_outputs_equivalent": "test_pipeline.test_a_tuple_holds_what_the_output_holds",
    "pt_np_pil_outputs_equivalent": "test_pipeline.test_the_output_types_hold_the_same_image",
    "pt_np_pil_inputs_equivalent": "test_pipeline_contracts.test_images_as_inputs_may_be_of_any_kind",
    "float16_inference to_device to_dtype": """
        test_pipeline_contracts.test_it_moves_with_its_model_between_types_and_devices""",
    "torch_dtype_dict": """
        test_pipeline_contracts.test_a_type_can_be_given_for_each_component
        test_pipeline_contracts.test_a_type_for_a_component_that_is_not_there_is_refused""",
    "loading_with_variants loading_with_incorrect_variants_raises_error serialization_with_variants": """
        test_pipeline_contracts.test_weights_are_saved_and_found_under_another_name_and_in_shards
        test_pipeline_contracts.test_a_folder_that_lost_its_weights_is_refused""",
    "callback_inputs callback_cfg": """
        test_pipeline_contracts.test_the_callback_is_given_what_it_asks_for_and_nothing_else
        test_pipeline.test_the_callback_sees_each_scale_and_the_last_preview_is_the_image
        A callback watches: what it returns is not read.""",
    "cfg": """
        test_pipeline_contracts.test_guidance_of_one_reads_no_second_row
        test_pipeline.test_prompt_seed_and_guidance_each_change_the_image""",
    "interrupt": """
        test_pipeline_contracts.test_an_interrupted_call_leaves_the_next_one_whole
        test_pipeline.test_an_interrupted_drawing_gives_the_preview_of_its_scales""",
    "loading by DiffusionPipeline": """
        test_pipeline_contracts.test_the_class_is_found_by_the_name_that_the_folder_holds
        test_pipeline.test_diffusion_pipeline_loads_it_in_a_fresh_process_through_its_pipeline_file""",
    """model_cpu_offload_forward_pass cpu_offload_forward_pass_twice sequential_cpu_offload_forward_pass
    sequential_offload_forward_pass_twice from_pipe_consistent_forward_pass_cpu_offload""": """
        test_pipeline.test_offloading_brings_the_model_to_its_device_before_it_draws
        test_pipeline.test_an_offloaded_pipeline_draws_and_goes_back_to_the_cpu
        test_model_contracts.test_a_model_with_its_vision_tokenizer_on_disk_reads_images""",
    "pipeline_with_accelerator_device_map group_offloading_inference": "Needs accelerators.",
    "push_to_hub": """
        test_pipeline.test_the_pipeline_file_is_there_before_the_folder_is_uploaded
        The rest needs a network.""",
    """attention_slicing_forward_pass xformers_attention_forwardGenerator_pass layerwise_casting_inference vae_slicing
    vae_tiling freeu fused_qkv_projections StableDiffusionMixin_component""": """
        Options of diffusers' own models; the model here is one of transformers.""",
    "encode_prompt_works_in_isolation karras_schedulers_shape latents_input multi_vae": """
        There are no prompt embeddings, schedulers or latents to give.""",
    "IP adapters, caches of denoising steps": "Nothing is denoised.",
}

SUITES = {
    "models": MODELS,
    "generation": GENERATION,
    "processors": PROCESSORS,
    "image processors": IMAGE_PROCESSORS,
    "pipelines": PIPELINES,
}


@pytest.mark.parametrize("suite", SUITES)
def test_every_check_stands_where_the_table_says(suite):
    files = {path.stem: path.read_text() for path in Path(__file__).parents[1].glob("*/test_*.py")}
    for checks, place in SUITES[suite].items():
        assert place.strip(), checks
        for file, test in re.findall(r"(test_\w+)\.(test_\w+)", place):
            assert f"def {test}(" in files[file], (checks, file, test)


@pytest.mark.parametrize("suite", SUITES)
def test_no_check_stands_twice(suite):
    names = [name for checks in SUITES[suite] if "," not in checks for name in checks.split()]
    assert len(names) == len(set(names))
